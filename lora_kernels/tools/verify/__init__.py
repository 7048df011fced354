"""``python -m lora_kernels verify``: which GPU kernels are right and fast on this machine.

The process of the command (`cli`) never touches a GPU. It starts other processes (`processes`), each of which does one
job (`child`):

* `survey`: which GPUs there are, and which classes of kernels could run on each,
* `judging`: run one class of kernels, and judge its results. A kernel that hangs costs only its own process,
* `tuning`: measure the plans of a back-end,
* `times`: time the classes that are right beside their rivals,
* `choices`: tell what the automatic choice makes of it.

What is found goes to the file of evidence as it comes (`lora_kernels.evidence`).
"""
