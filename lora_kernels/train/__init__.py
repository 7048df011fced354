"""How adapters are trained: learning rates by matrix, frozen matrices, restarts and their schedule."""

from lora_kernels.train.restart import RestartedLayer as RestartedLayer
from lora_kernels.train.restart import RestartReport as RestartReport
from lora_kernels.train.restart import restart as restart
from lora_kernels.train.schedule import jagged_cosine as jagged_cosine
