"""The way of a call from its public function to the back-end that computes it.

linear.py, group.py, dora.py    the public functions and their autograd Functions
prepare.py, check.py            the first step of every call: autocast, checks, scale and seed
watched.py                      the test whether anything observes a call
direct.py                       six functions that choose a back-end and call it, for calls that nothing observes
registered.py                   the same six functions through operators that torch knows, for calls that are observed
dora_norm.py                    the row norms of W + s·B A that DoRA divides by
dora_passes.py                  the passes over matrices that DoRA adds to LoRA
autograd.py                     the contexts of a backward, and the refusal of second derivatives
"""
