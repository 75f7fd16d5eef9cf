"""Advice: what the data is like, and which method, β, learning rate, epochs and adapter follow from it.

look      rows -> facts, streamed, with a sample of the texts
alike     near copies; noise: who contradicts whom; content: scripts, and what a program could check
ask       what a model says of the same data, and what of its training fits
rules     the decision tree, one table; signs: what its conditions read off the facts
run       the walk, and the settings that come out; page: the same for people
"""
