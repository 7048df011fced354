"""Several fine-tuning jobs on one frozen base, in one process: `Jobs`, `Job` and `LoRAConfig`.

    loss = Σ_i loss_i(the rows of job i)

Each step draws a batch for every job, computes the base once for the rows of all of them, and gives each row the
adapter of its job. An adapter sees its own rows only, so the gradient of the sum is, for each adapter, the gradient of
its own loss.

Ye et al., "mLoRA: Fine-Tuning LoRA Adapters via Highly-Efficient Pipeline Parallelism in Multiple GPUs", 2023
(arXiv:2312.02515), train several adapters over one base in this way.
"""

from lora_kernels.jobs.job import Job, LoRAConfig, next_token_loss
from lora_kernels.jobs.jobs import Jobs
from lora_kernels.jobs.runner import Progress

__all__ = ["Job", "Jobs", "LoRAConfig", "Progress", "next_token_loss"]
