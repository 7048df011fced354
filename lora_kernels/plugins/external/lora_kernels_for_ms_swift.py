"""The file for ms-swift's ``--external_plugins``."""

from lora_kernels.plugins.ms_swift import install

install()
