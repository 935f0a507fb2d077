"""One adapter handed on: as a PEFT folder, merged into its base, as a GGUF file for llama.cpp, as a folder for vLLM.

source.py  the adapter that a run or a folder holds, and its ranks cut where that is wanted
peft.py    a PEFT folder, and the base model with the adapter merged in
vllm.py    what vLLM expects of a folder, and one that suits it
names.py   what the modules of an architecture are called in a GGUF file, and how llama.cpp orders their rows
gguf.py    a GGUF file
forms.py   the forms by name, and what was written
table.py   the same for people
"""
