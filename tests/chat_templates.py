"""Chat templates in the forms of known model families, and conversations to write in them.

Each is written out here after the structure that the family's models were trained on; none is copied from a checkpoint.
CONTROLS are the tokens that they need beside BOS and EOS.
"""

CONTROLS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|observation|>", "<|endoftext|>",
    "<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<think>", "</think>",
)  # fmt: skip

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the marks take in the assistant's header and the line break after its turn
MARKED_WHOLE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# with tools: described in a system turn, called in the assistant's, answered in turns of their own
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Templates that write an answer otherwise once others follow, or after another prompt than they write before it.
# last: the place of the last user's turn; thought, answer: the two parts of an assistant's turn
_PARTS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}{% set answer = m.content %}"
    "{% if not thought and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' }}"
    "{{ call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
)
_CHATML_ROLE = "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
# as Qwen3: thinking stands in the answers after the last question alone
RECENT = (
    _PARTS + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ answer }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}"
    + _CHATML_ROLE
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# as Qwen3.5: the prompt opens the thinking, too
OPENED = RECENT.replace("loop.index0 > ns.last and (loop.last or thought)", "loop.index0 > ns.last").replace(
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{ '<think>\n' }}",
)
# as Nemotron 3: the prompt opens the thinking, and an answer without any is written with an empty one
EMPTY = OPENED.replace(
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}",
    "{% if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought + '\n</think>\n' }}"
    "{% else %}{{ '<think></think>' }}{% endif %}",
)
# as Qwen3.5 without thinking: the prompt closes it at once
SHUT = OPENED.replace("{{ '<think>\n' }}{% endif %}", "{{ '<think>\n\n</think>\n\n' }}{% endif %}")
# as DeepSeek: the prompt opens the thinking, and no answer is written with it; arguments of calls are text
UNSAID = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<|observation|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content.split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' + call.function.arguments }}"
    "{% endfor %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# as GLM 4.5: the token that begins the next turn ends an answer
ENDLESS = (
    _PARTS + "{% if m.role == 'assistant' %}{{ '<|assistant|>\n<think>' }}"
    "{{ thought if loop.index0 > ns.last else '' }}{{ '</think>\n' + answer }}"
    + _CALLS
    + "{% elif m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# as Phi 3.5: another token ends the conversation
CLOSED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# as gpt-oss: thinking in a channel of its own, another end for the last answer and for calls; thinking before a call
# stands until an answer without a call follows
CHANNELS = (
    "{{ '<|start|>system<|message|>The ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('channels belong to the template') }}{% endif %}"
    "{% if m.tool_calls %}{% set later = namespace(answer=false) %}"
    "{% for other in messages[loop.index:] %}{% if other.role == 'assistant' and not other.tool_calls %}"
    "{% set later.answer = true %}{% endif %}{% endfor %}"
    "{% if m.thinking and not later.answer %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|channel|>commentary<|message|>' }}"
    "{{ m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_THOUGHT_AND_CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "call it",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds a and b"}}

# name -> template, where generation stops, an answer after its prompt with thinking and without
TURNING = {
    "recent": (
        RECENT, ["<|im_end|>"],
        "<think>\n{t}\n</think>\n\n{a}<|im_end|>", "<think>\n\n</think>\n\n{a}<|im_end|>",
    ),
    "opened": (OPENED, ["<|im_end|>"], "{t}\n</think>\n\n{a}<|im_end|>", "\n</think>\n\n{a}<|im_end|>"),
    "empty": (EMPTY, ["<|im_end|>"], "{t}\n</think>\n{a}<|im_end|>", "\n</think>\n{a}<|im_end|>"),
    "shut": (SHUT, ["<|im_end|>"], "{a}<|im_end|>", "{a}<|im_end|>"),
    "unsaid": (UNSAID, ["</s>"], "{t}\n</think>\n\n{a}</s>", "\n</think>\n\n{a}</s>"),
    "endless": (
        ENDLESS, ["<|endoftext|>", "<|user|>", "<|observation|>"],
        "\n<think>{t}</think>\n{a}<|user|>", "\n<think></think>\n{a}<|user|>",
    ),
    "closed": (CLOSED, ["</s>", "<|end|>"], "{a}<|end|>", "{a}<|end|>"),
    "closed once": (CLOSED, ["</s>"], "{a}<|end|>\n</s>", "{a}<|end|>\n</s>"),
    "channels": (
        CHANNELS, ["<|return|>", "<|call|>"],
        "<|channel|>analysis<|message|>{t}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|return|>",
        "<|channel|>final<|message|>{a}<|return|>",
    ),
}  # fmt: skip
# name -> messages of chats in them, and their tools
TURNED = {
    "plain": (
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4, as you know."},
            {"role": "user", "content": "And Größe in English?"},
            {"role": "assistant", "content": "Size."},
        ],
        None,
    ),
    "thinking": (
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4.", "reasoning_content": "two and two"},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "6.", "reasoning_content": "three twice"},
        ],
        None,
    ),
    "inside": (
        [
            {"role": "user", "content": "Is <think> a tag?"},
            {"role": "assistant", "content": "<think>\ntags, I think\n</think>\n\nIt is."},
            {"role": "user", "content": "And </think>?"},
            {"role": "assistant", "content": "<think>\nthe other\n</think>\n\nIt ends."},
        ],
        None,
    ),
    "tool": (
        [
            {"role": "user", "content": "What is 2 + 3?"},
            _THOUGHT_AND_CALL,
            {"role": "tool", "name": "add", "content": "5"},
            {"role": "assistant", "content": "It is 5.", "reasoning_content": "so five"},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Welcome."},
        ],
        [TOOL],
    ),
    "twice": (
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "One."},
            {"role": "assistant", "content": "Two.", "reasoning_content": "again"},
        ],
        None,
    ),
}

# name -> template, whether it takes a system turn, whether it cuts blanks around a turn, what ends an answer
FAMILIES = {
    "chatml": (CHATML, True, False, "<|im_end|>"),
    "llama2": (LLAMA2, True, True, "</s>"),
    "llama3": (LLAMA3, True, True, "<|eot_id|>"),
    "zephyr": (ZEPHYR, True, False, "</s>"),
    "mistral": (MISTRAL, False, False, "</s>"),
    "gemma": (GEMMA, False, True, "<end_of_turn>"),
    "marked": (MARKED, True, False, "<|im_end|>"),
}

SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4, as you know."},
    {"role": "user", "content": "And Größe in English?"},
    {"role": "assistant", "content": "Size.\n\nOr height: it depends \U0001f600"},
]
