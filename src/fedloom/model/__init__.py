"""One client's work: base model, examples, tokens, training, scores."""

import logging

# PEFT imports bitsandbytes wherever that is installed, which then says in every run that it has no kernel for products
# of 4 bits in bfloat16 without gradients. fedloom never calls that kernel (`quantized.keep_differentiable`).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
