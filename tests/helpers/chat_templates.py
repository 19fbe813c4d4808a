"""Small chat templates with the Jinja features of the families', and a tokenizer to try them.

They are not the published ones: short, but with what makes those hard. Reasoning that leaves the
history, a system prompt that moves into the user's turn, macros, dates, tools, refusals.
"""

from transformers import PreTrainedTokenizerBase

from peagle.target.target import TargetSource

MARKS = ["<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>"]

QWEN3 = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- set ns = namespace(last=messages | length - 1) -%}
{%- for m in messages[::-1] -%}
  {%- if m.role == 'user' and not ns.found -%}
    {%- set ns.found = true -%}{%- set ns.last = messages | length - 1 - loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set said = m.content -%}{%- set thought = m.reasoning_content or '' -%}
    {%- if '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1] -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last %}<think>
{{ thought.strip('\\n') }}
</think>

{% endif %}{{ said }}
    {%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
<|im_end|>
{% elif m.role == 'tool' -%}
<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% else -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif -%}
{%- endif -%}"""

LLAMA3 = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
<|start_header_id|>system<|end_header_id|>

{% if tools %}Tools: {{ tools | tojson(indent=2) }}
{% endif %}Today: {{ date_string | default('26 Jul 2024') }}

{{ system }}<|im_end|>
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>

{% endif -%}"""

HARMONY = """\
{%- macro say(role, channel, text, end) -%}
<|start|>{{ role }}{% if channel %}<|channel|>{{ channel }}{% endif %}<|message|>{{ text }}{{ end }}
{%- endmacro -%}
{{- say('system', '', 'Reasoning: ' + (reasoning_effort or 'medium'), '<|end|>') -}}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- if m.thinking and loop.last and not add_generation_prompt -%}
      {{- say('assistant', 'analysis', m.thinking, '<|end|>') -}}
    {%- endif -%}
    {{- say('assistant', 'final', m.content, '<|im_end|>' if loop.last else '<|end|>') -}}
  {%- else -%}
    {{- say('developer' if m.role == 'system' else m.role, '', m.content, '<|end|>') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set first = messages[0].content + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for m in loop_messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Roles must alternate') -}}
  {%- endif -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ first if loop.first else '' }}{{ m.content | trim }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}"""

TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "harmony": HARMONY, "gemma": GEMMA}


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    """The embedded tokenizer, whose end token closes every answer, with another template."""
    tokenizer = TargetSource("tiny").tokenizer()
    tokenizer.add_tokens(MARKS)
    tokenizer.chat_template = template
    return tokenizer
