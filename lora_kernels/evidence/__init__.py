"""Evidence: what was found out about the GPU kernels on a device, and where it is kept.

``python -m lora_kernels verify`` runs every class of kernels on this machine and writes one file per device: which
classes are right, how long they and their rivals take in each bucket of sizes, and which plans are fastest. The file is
valid for one device, one set of versions and one state of the kernels' sources (`identity`). `file` holds the format,
`find` the places where files are looked for.

`backends.dispatch` reads the verdicts and the times, and `plans.choose` reads the plans. ``shipped/`` holds the files
that come with the package. It is empty, because no kernel has run on a GPU yet.
"""
