r"""
Instructions and answers as text for a model to continue: a prompt, made by a template, then the answer.

>>> render('Question: {instruction}\n\nAbout: {input}\n\nAnswer: ', 'What is {x}?')
'Question: What is {x}?\n\nAnswer: '

A template is text with {instruction} in it and, if the data have inputs, {input}. It belongs to a dataset
and to the models trained on it, which expect the same wording in a prompt.
"""
import re

TEMPLATE = """Below is an instruction that describes a task. Write a response that completes it.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""

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
    """ [(instruction, input, answer)] from Alpaca's fields, or from each assistant turn in messages

    The system and user messages before an assistant turn, joined by a blank line, are its instruction; those
    after the last turn are dropped. Raises ValueError for other items; the caller prefixes the item's place.
    """
    if 'messages' not in item:
        turn = item.get('instruction'), item.get('input') or '', item.get('output')
        if not all(isinstance(field, str) for field in turn):
            raise ValueError(f"has the fields {', '.join(item)}; expected text in instruction and output, "
                             "and perhaps in input, or else messages")
        if not turn[0].strip():
            raise ValueError("has a blank instruction; expected a text to answer; write one, or take the "
                             "item out")
        return [turn]
    messages, turns, said = item['messages'], [], []
    for role, content in map(read_message, messages if isinstance(messages, list) else [messages]):
        if role != 'assistant':
            said.append(content)
        elif said:
            turns.append(('\n\n'.join(said), '', content))
            said = []
        else:
            raise ValueError("has an assistant turn that follows nothing; expected one of user before it")
    if not turns:
        raise ValueError("has no assistant turn in its messages; expected an answer to learn from")
    return turns

def read_message(message) -> tuple[str, str]:
    """ the role and content of a message; raises ValueError unless both are text """
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ('role', 'content'))
    if role not in ('system', 'user', 'assistant') or not isinstance(content, str):
        raise ValueError(f"has the message {str(message)[:80]!r}; expected text as its content, and system, "
                         "user or assistant as its role")
    return role, content

def encode(turns: list[tuple[str, str, str]], template: str, tokenizer) -> tuple[list[int], list[int]]:
    """ the ids of an item, each answer ended by end-of-text, and a mask: 1 for answers, 0 for prompts

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
    return ids, mask
