"""prefopt against TRL, and against itself: the same model, pairs, order, batch, optimizer and precision, in one run on one machine.

    python -m bench.versus --workload hh --shape 32m --data FOLDER

Each contestant is a process of its own that runs its real training entry point. It stops after every few steps and waits,
idle, until it is its turn again, so that blocks of the contestants alternate and what else the machine does meets all of
them alike. A second process of the same prefopt shows how far two blocks differ when nothing does. See bench/README.md.

Read it in this order: `shapes` and `workloads` make what is run, `contestants` says by whom; `child` is a contestant's
process, with `side_prefopt`, `side_trl` and `side_tokenise` behind it, and `turns` its end of the line; `match` holds the
other end and lets them take turns; `figures` and `results` make numbers and tables of it.
"""
