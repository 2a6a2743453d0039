"""What connects the nodes to ComfyUI: the VAE object, wires, progress and reports, schemas, videos."""
