# train GPT-2 small (124M parameters) from scratch on OpenWebText, on 8 GPUs, with the default options:
# 600,000 iterations of 491,520 tokens, 300 billion in all
# needs train.bin and val.bin in data/openwebtext, such as nanoGPT's prepare.py writes
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = 'out-train-gpt2'
eval_interval, log_interval = 1000, 10
