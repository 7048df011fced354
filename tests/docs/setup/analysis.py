"""The names and adapters that docs/analysis.md takes for granted."""

from support.adapter_models import net, train

from lora_kernels import apply_lora, save_adapter

model = net()
for _r in (8, 64):
    adapted_model = net()
    apply_lora(adapted_model, r=_r, target_modules=["inner.fc"])
    save_adapter(train(adapted_model), f"runs/r{_r}")
