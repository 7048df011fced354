"""LoRA in whole models of plain PyTorch, and adapters on disk, by PEFT's rules and in PEFT's files."""
