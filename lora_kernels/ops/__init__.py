"""A call from its public function to the back-end that computes it.

linear.py, group.py, dora.py    the public functions and their autograd Functions
prepare.py, check.py            what every call goes through first: autocast, checks, scale and seed
watched.py                      whether something observes the operators of a call
direct.py                       the call of a back-end, where nothing does
registered.py                   the same calls through operators registered with torch, where something does
dora_norm.py                    the row norms of W + s·B A that DoRA divides by, and the cache of ‖W‖²
autograd.py                     what the autograd Functions share
"""
