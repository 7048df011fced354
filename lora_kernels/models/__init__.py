"""LoRA in whole models of plain PyTorch, and adapters on disk. The rules and the files are PEFT's."""
