"""``python -m lora_kernels verify``: which GPU kernels are right and fast on this machine.

The process of the command (`cli`) never touches a GPU. It starts other processes (`processes`), each of which does one
job (`child`):

* `survey.main`: find out which GPUs there are, and which classes of kernels could run on each,
* `judge_class`: run one class of kernels, and judge its results. A kernel that hangs costs only its own process,
* `tuning`: measure the plans of `triton` and `cuda`,
* `times`: time the classes that are right beside their rivals,
* `survey.chosen`: find out what the automatic choice takes now.

What is found goes to the file of evidence as it comes (`lora_kernels.evidence`).
"""
