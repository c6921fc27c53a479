"""Tests of other projects whose assertions cannot hold once tokens are dropped, each with its reason."""

from __future__ import annotations

ATTENTIONS = "asserts attention maps of the prompt's width; pruned layers attend over the kept tokens only"
CANNOT_HOLD: dict[str, str] = {
    "test_attention_outputs*": ATTENTIONS,
    "test_greedy_generate_dict_outputs*": ATTENTIONS,
    "test_sample_generate_dict_output*": ATTENTIONS,
    "test_beam_sample_generate_dict_output*": ATTENTIONS,
    "test_beam_search_generate_dict_output*": ATTENTIONS,
    "test_assisted_decoding_matches_greedy_search*": ATTENTIONS,
    "test_assisted_decoding_sample*": ATTENTIONS,
    "test_past_key_values_format*": "asserts a cache of the prompt's width; a pruned cache holds the kept tokens only",
}
"""Pattern of test names -> why a pruned model (ratio below 1, or r above 0) rightly fails it."""
