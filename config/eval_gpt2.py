# evaluate GPT-2 (124M) on OpenWebText, untrained by us; --init_from=gpt2-xl and its like for the other sizes
# needs train.bin and val.bin in data/openwebtext, such as nanoGPT's prepare.py writes, or another --dataset
# $ python train.py config/eval_gpt2.py
init_from = 'gpt2'
eval_only = True
batch_size, eval_iters = 8, 500 # more make a better estimate
