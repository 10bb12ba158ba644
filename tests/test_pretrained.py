import os

import pretrained

def test_a_tensorflow_model_without_hparams_has_heads_of_64_as_openai_s(tmp_path):
    for n_embd, n_head in ((768, 12), (1024, 16), (1280, 20), (1600, 25)):
        shapes = {'model/wte': [50257, n_embd], 'model/wpe': [1024, n_embd],
                  'model/h0/attn/c_attn/w': [1, n_embd, 3 * n_embd], 'model/h1/ln_1/g': [n_embd]}
        config = pretrained.read_shape(str(tmp_path / 'model'), shapes, 0.0)
        assert (config.n_head, config.n_layer, config.block_size) == (n_head, 2, 1024)

def test_without_tensorflow_s_note_the_newest_of_its_checkpoints_is_taken(tmp_path):
    for at, name in enumerate(('model-900', 'model-950', 'model-1000')):
        (tmp_path / f'{name}.index').touch()
        os.utime(tmp_path / f'{name}.index', (at, at))
    assert pretrained.find_tensorflow(str(tmp_path)) == str(tmp_path / 'model-1000')

def test_a_hugging_face_model_is_read_as_one_whatever_lies_beside_it(tmp_path):
    (tmp_path / 'model.ckpt.index').touch()
    assert pretrained.find_tensorflow(str(tmp_path)) == str(tmp_path / 'model.ckpt')
    (tmp_path / 'config.json').write_text('{}')
    assert pretrained.find_tensorflow(str(tmp_path)) is None

def test_characters_are_in_the_order_of_their_ids_however_they_are_written():
    assert pretrained.read_chars({'type': 'WordLevel', 'vocab': {'b': 1, 'a': 0}}) == ['a', 'b']
    for vocab in ({'b': 1, 'a': 1}, {'b': 2, 'a': 0}, {'bc': 1, 'a': 0}):
        assert pretrained.read_chars({'type': 'WordLevel', 'vocab': vocab}) is None
