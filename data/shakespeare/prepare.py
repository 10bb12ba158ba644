"""
Tiny Shakespeare in GPT-2's tokens: 301,966 to train on and 36,059 to validate on.
"""
# where the text comes from, unless input.txt is in this folder already
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt' # the text
sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed' # checksum of that file

import os
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(_folder, '..', '..')) # for the project's modules

from configurator import configure
configure(globals())

from publish import fetch, write_dataset
from tokenizer import BPETokenizer

text = fetch(url, os.path.join(_folder, 'input.txt'), sha256)
write_dataset(_folder, text, BPETokenizer())
