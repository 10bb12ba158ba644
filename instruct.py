r"""
Instructions and answers as text for a model to continue: a prompt, made by a template, then the answer.

>>> render('Question: {instruction}\n\nAbout: {input}\n\nAnswer: ', 'What is {x}?')
'Question: What is {x}?\n\nAnswer: '

A template is text with {instruction} in it and, if the data have inputs, {input}. It belongs to a dataset
and to the models trained on it, which expect the same wording in a prompt.
"""
import json
import re

from dataset import ENDS_ITEM

TEMPLATE = """Below is an instruction that describes a task. Write a response that completes it.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""

# what datasets call the parts of an item; where one has several of these fields, the first counts
NAMES = {'system': ('system', 'system_prompt'),
         'instruction': ('instruction', 'prompt', 'question', 'query'),
         'input': ('input', 'context'),
         'output': ('output', 'completion', 'response', 'answer')}
TALKS = 'messages', 'conversations'
ROLES = {'human': 'user', 'gpt': 'assistant'} # ShareGPT's names

def is_item(fields) -> bool:
    """ whether a row with these fields is one that read_turns is for """
    return any(name in fields for name in TALKS) or all(
        any(name in fields for name in NAMES[part]) for part in ('instruction', 'output'))

def render(template: str, instruction: str, input: str = '') -> str:
    """ the prompt, which the answer follows directly; without input, paragraphs with {input} are left out

    Braces in instruction and input are plain text. Raises ValueError if the instruction would be lost.
    """
    if not input.strip():
        template = '\n\n'.join(part for part in template.split('\n\n') if '{input}' not in part)
    if '{instruction}' not in template:
        raise ValueError("the template has no {instruction} in a paragraph without {input}; expected text "
                         "such as '### Instruction:\\n{instruction}\\n\\n### Response:\\n'")
    values = {'{instruction}': instruction, '{input}': input}
    return re.sub(r'\{instruction\}|\{input\}', lambda found: values[found[0]], template)

def read_turns(item: dict) -> list[tuple[str, str, str]]:
    """ [(instruction, input, answer)] from the fields in NAMES, or from each assistant turn of a talk

    The system and user messages before an assistant turn, joined by a blank line, are its instruction; those
    after the last turn are dropped. Raises ValueError for other items; the caller prefixes the item's place.
    """
    talk = next((name for name in TALKS if item.get(name) is not None), None)
    if talk is None:
        system, instruction, input, output = (read_part(item, names) for names in NAMES.values())
        if instruction is None or output is None:
            raise ValueError(f"has the fields {', '.join(item)}; expected instruction and output, and "
                             "perhaps input, or else messages; data/instruct/readme.md lists other names")
        instruction = f'{system}\n\n{instruction}' if (system or '').strip() else instruction
        return check_asked([(instruction, input or '', output)])
    messages, turns, said = item[talk], [], []
    for role, content in map(read_message, messages if isinstance(messages, list) else [messages]):
        if role != 'assistant':
            said.append(content)
        elif said:
            turns.append(('\n\n'.join(said), '', content))
            said = []
        else:
            raise ValueError("has an assistant turn that follows nothing; expected one of user before it")
    if not turns:
        raise ValueError(f"has no assistant turn in its {talk}; expected an answer to learn from")
    return check_asked(turns)

def read_part(item: dict, names: tuple[str, ...]) -> str | None:
    """ the first of these fields that is there, as text, or None; raises ValueError for lists and objects """
    name = next((name for name in names if item.get(name) is not None and item[name] == item[name]), None)
    value = item.get(name) # NaN, as pandas writes a missing one, does not equal itself
    if isinstance(value, (int, float)):
        return json.dumps(value)
    if not isinstance(value, (str, type(None))):
        raise ValueError(f"has {str(value)[:80]} as its {name}; expected text; take that item out, or rename "
                         "the field")
    return value

def check_asked(turns: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """ the same turns; raises ValueError if one answers nothing """
    if not all(instruction.strip() for instruction, *_ in turns):
        raise ValueError("has a blank instruction; expected a text to answer; write one, or take the "
                         "item out")
    return turns

def read_message(message) -> tuple[str, str]:
    """ the role and content of a message, or ShareGPT's from and value; raises ValueError unless both are
    text """
    keys = ('from', 'value') if isinstance(message, dict) and 'from' in message else ('role', 'content')
    role, content = (message.get(key) if isinstance(message, dict) else None for key in keys)
    role = ROLES.get(str(role), role)
    if role not in ('system', 'user', 'assistant') or not isinstance(content, str):
        raise ValueError(f"has the message {str(message)[:80]!r}; expected text as its content, and system, "
                         "user or assistant as its role")
    return role, content

def encode(turns: list[tuple[str, str, str]], template: str, tokenizer) -> tuple[list[int], list[int]]:
    """ the ids of an item, each answer ended by end-of-text, and a mask: 1 for answers, 2 for the end of the
    last, 0 for prompts

    Prompt and answer are encoded separately, so that a later prompt has exactly the ids seen in training.
    Raises ValueError for an input that the template has no {input} for; the caller prefixes the item's place.
    """
    ids, mask = [], []
    for instruction, input, answer in turns:
        if input.strip() and '{input}' not in template:
            raise ValueError("has an input, but the template has no {input}, so it would be lost; type "
                             "--template with {input} in it, such as '{instruction}\\n\\n{input}\\n\\n', or "
                             "take the inputs out")
        prompt = tokenizer.encode(render(template, instruction, input))
        reply = [*tokenizer.encode(answer), tokenizer.eot]
        ids += prompt + reply
        mask += [0] * len(prompt) + [1] * len(reply)
    return ids, mask[:-1] + [ENDS_ITEM]
