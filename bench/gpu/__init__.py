"""Everything that is measured on a GPU, in calls of at most eight minutes, most important first: bench/gpu.sh

Each step is a process of its own with a time limit of its own; one that fails or takes too long does not stop the others. What a
step gave is written down as soon as it ends, and the table anew, so that an end at any moment keeps what was done. `--rehearse` runs
the same steps on the CPU with models of a million weights. `--table FILES` writes the table of the bars from what was measured
before, on several days or machines too; what no file holds is listed as not measured.
"""
