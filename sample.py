"""
Continues a prompt with text from a trained model, several samples at once:

$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
"""
# -----------------------------------------------------------------------------
# options

# which model
init_from = 'resume' # resume (the model in out_dir), gpt2, gpt2-medium, -large, -xl, a hub id, a path
out_dir = 'out' # a run's folder, to use its ckpt.pt (else last.pt), or a checkpoint's path
# what to write
start = '\n' # the prompt; \n alone is a line end; FILE:prompt.txt reads a file; <|endoftext|> is that token
instruction = '' # used instead of start: a question, put in the training template; only answers are printed
input = '' # what the instruction is about, if anything
num_samples = 10 # number of samples, generated together
max_new_tokens = 500 # maximum number of tokens per sample
stop = '' # end a sample where this text appears (\n alone is a line end); the text is not printed
stream = False # print the first sample as it is generated
# how to draw tokens
temperature = 0.8 # below 1 is more conservative, above 1 more random; 0 always takes the likeliest token
top_k = 200 # draw only from the top_k likeliest tokens; 0 for all
top_p = 1.0 # draw only from the likeliest tokens whose probabilities add up to this
repetition_penalty = 1.0 # above 1, such as 1.2, tokens that the model sees already become less likely
seed = 1337 # random seed of the draws
# machine
device = 'auto' # auto, cpu, cuda, cuda:1, mps
dtype = 'auto' # auto, float32, bfloat16, float16

from configurator import configure
configure(globals(), at_least_1=('num_samples', 'max_new_tokens'))

# -----------------------------------------------------------------------------
# set-up

import codecs
import os
import sys
import time

import torch
from tqdm import tqdm

import checkpoint as checkpoints
from device import DTYPES, pick_device, pick_dtype
from instruct import render
from text import read_text
from tokenizer import from_state

if not 0 < top_p <= 1:
    raise ValueError(f"top_p is {top_p}; type --top_p=P with 0 < P <= 1")
if not repetition_penalty:
    raise ValueError("repetition_penalty is 0; type --repetition_penalty=X above 0, or 1 for none")
if instruction and start != '\n':
    raise ValueError("both start and instruction are given, but a sample begins with one of them; type "
                     "--start=TEXT or --instruction=TEXT")
if input and not instruction:
    raise ValueError(f"input is {input!r}, but there is no instruction that it is for; type "
                     "--instruction=TEXT, too, or --start=TEXT instead")

if hasattr(sys.stdout, 'reconfigure'): # not a notebook's
    # a file is in UTF-8, as all of ours are; a terminal's encoding may lack some characters
    utf8 = not sys.stdout.isatty() and not os.environ.get('PYTHONIOENCODING')
    sys.stdout.reconfigure(encoding='utf-8' if utf8 else None, errors='replace')
device = pick_device(device)
dtype = pick_dtype(dtype, device)

# -----------------------------------------------------------------------------
# model and tokenizer

model, loaded = checkpoints.load_model(checkpoints.source_of(init_from, out_dir))
tokenizer = from_state(checkpoints.find_tokenizer(loaded, model.config.vocab_size))
model.eval().to(device, DTYPES[dtype])

# -----------------------------------------------------------------------------
# prompt

if start.startswith('FILE:'):
    try:
        start = read_text(start.removeprefix('FILE:'))
    except OSError as error:
        raise OSError(f"cannot read the prompt {start} ({error.strerror}); type --start=FILE:PATH of a "
                      "text") from None
if instruction:
    if not loaded.get('template'):
        raise ValueError("the model was not trained on instructions; type --start=TEXT, or train it on data "
                         "of data/instruct/prepare.py")
    if input.strip() and '{input}' not in loaded['template']:
        raise ValueError("the model's template has no {input}, so the input would be lost; type it in "
                         "--instruction, and no --input")
    start = render(loaded['template'], instruction, input)
prompt = tokenizer.encode(start, allow_special=not instruction)
shown = '' if instruction else start # printed before each sample
if len(prompt) > model.config.block_size:
    print(f"the prompt has {len(prompt):,} tokens, of which the model sees the last "
          f"{model.config.block_size:,}", file=sys.stderr)
prompt = prompt or [tokenizer.first]

# -----------------------------------------------------------------------------
# samples

class Sample:
    """ the text of one sample as it grows, until end-of-text or `stop` """

    def __init__(self):
        self.text, self.ended, self.printed = '', False, 0
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace') # holds back incomplete characters

    def add(self, token, last):
        if self.ended:
            return
        self.ended = last or token == tokenizer.eot
        new = b'' if token == tokenizer.eot else tokenizer.token_bytes(token)
        self.text += self.decoder.decode(new, final=self.ended)
        if stop and stop in self.text:
            self.text, self.ended = self.text[:self.text.index(stop)], True

    def print_new(self):
        """ print what is new since the last call, but hold back an ending that may become `stop` """
        starts = [n for n in range(len(stop)) if self.text.endswith(stop[:n])]
        held = 0 if self.ended else max(starts, default=0)
        upto = len(self.text) - held
        print(self.text[self.printed:upto], end='', flush=True)
        self.printed = upto

samples = [Sample() for _ in range(num_samples)]
idx = torch.tensor([prompt] * num_samples, device=device)
torch.manual_seed(seed)
if stream:
    print(shown, end='', flush=True)
begin = time.perf_counter()
tokens = model.stream(idx, max_new_tokens, temperature, top_k, top_p, tokenizer.n_vocab,
                      repetition_penalty=repetition_penalty)
progress = tqdm(tokens, total=max_new_tokens, unit='tok', delay=1, leave=False, disable=stream)
n, stopped = 0, False
try:
    for n, token in enumerate(progress, 1):
        for sample, t in zip(samples, token.tolist()):
            if t < 0:
                raise ValueError(f"the model's probabilities are not finite in {dtype}; type "
                                 "--dtype=float32, or take another checkpoint")
            sample.add(t, last=n == max_new_tokens)
        if stream:
            samples[0].print_new()
        if all(sample.ended for sample in samples):
            break
except KeyboardInterrupt: # print what there is so far
    stopped = samples[0].ended = True
    if stream:
        samples[0].print_new()
progress.close()
tokens.close()
seconds = time.perf_counter() - begin
for i, sample in enumerate(samples):
    print('' if stream and i == 0 else shown + sample.text)
    print('---------------')
print(f"{num_samples} x {n} tokens in {seconds:.1f} s, {num_samples * n / seconds:.0f} tok/s on {device} in "
      f"{dtype}",
      file=sys.stderr)
if stopped:
    sys.exit(130)
