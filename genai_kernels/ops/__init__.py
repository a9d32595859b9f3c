"""One folder per op. Import an op from its room, or from `genai_kernels`, which collects them all."""
