# evaluate GPT-2 (124M) on OpenWebText, as published; --init_from=gpt2-medium, gpt2-large, gpt2-xl for another
# needs train.bin and val.bin in data/openwebtext, such as nanoGPT's prepare.py writes, or another --dataset
# $ python train.py config/eval_gpt2.py
init_from = 'gpt2'
eval_only = True
batch_size, eval_iters = 8, 500 # more give a better estimate
