"""Fields of OpenAI's, vLLM's and SGLang's bodies that this server lacks, as tables to look them up in."""

from collections.abc import Mapping, Sequence
from typing import Any

# What asks for nothing, besides null; 0 as well, which equals False.
NOTHING: Sequence[Any] = (False, "", [], {})

# Any other value would need another answer than the one given, so it is an error.
UNSUPPORTED: Mapping[str, Sequence[Any]] = dict.fromkeys(
    """
    audio functions moderation prediction store suffix tools
    ebnf grammar guided_choice guided_decoding_backend guided_grammar guided_regex guided_whitespace_pattern
    regex structural_tag structured_outputs
    custom_logit_processor custom_params early_stopping logits_processors lora_path min_new_tokens mirostat
    no_stop_trim repetition_detection stop_regex use_beam_search vllm_xargs watermarking
    min_thinking_tokens reasoning
    bootstrap_host chat_template documents ec_transfer_params input_embeds input_ids kv_transfer_params
    media_io_kwargs mm_processor_kwargs prompt_embeds session_params
    logprob_token_ids return_hidden_states return_meta_info return_prompt_text return_routed_experts
    return_token_offsets return_tokens_as_token_ids
    cache_salt extra_key priority
    """.split(),
    NOTHING,
) | {
    # Where something else asks for nothing, or only null does.
    "best_of": (1,),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "enable_thinking": (),
    "guided_json": (),
    "include_reasoning": (True,),
    "json_schema": (),
    "length_penalty": (1, 0),
    "max_new_tokens": (),
    "max_thinking_tokens": (),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "thinking": (),
    "thinking_budget": (),
    "thinking_token_budget": (-1,),
    "truncation_side": ("left",),
    "typical_p": (1,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

ADVICE: Mapping[str, str] = {
    "chat_template": "the model's own is used",
    "enable_thinking": "give it in chat_template_kwargs",
    "max_new_tokens": "it is called max_tokens",
    "min_new_tokens": "it is called min_tokens",
    "reasoning_effort": "what the model's template knows of it goes into chat_template_kwargs",
}

# Bookkeeping, or of no consequence as long as there are no tools, no images and no separate reasoning.
HARMLESS = frozenset(
    """
    custom_labels data_parallel_rank function_call max_dynamic_patch metadata min_dynamic_patch
    parallel_tool_calls prompt_cache_key prompt_cache_options prompt_cache_retention request_id
    return_mm_kwargs rid routed_experts_prompt_start safety_identifier separate_reasoning service_tier
    session_id stream_interval stream_reasoning tool_choice user
    """.split()
)
