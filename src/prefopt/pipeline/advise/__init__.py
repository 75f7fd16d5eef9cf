"""Advice: what the data is like, and which method, β, learning rate, epochs and adapter follow from it.

look     rows -> facts, streamed, with a sample of the texts; gauge: their figures
alike    near copies; noise: who contradicts whom; content: scripts, and what a program could check
ask      what a model says of the same data, and what of its training fits
rules    the decision tree, one table; signs: its conditions; choices: values that follow from the facts
decide   the table applied, and the settings that come out; page: both for people; run: the walk
"""
