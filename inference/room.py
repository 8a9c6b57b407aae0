"""What a language model can read at once: its positions are for a prompt, with its visual tokens, and the answer."""

from collections.abc import Sequence

from command_line import counted
from inference.loading import room_for_text
from slide_vlm import SlideVLM


class PromptTooLong(ValueError):
    """A prompt behind which no position is left for an answer."""


def answer_limits(model: SlideVLM, prompt_lengths: Sequence[int], max_new_tokens: int) -> list[int]:
    """How many tokens the answer to each prompt may have: ``max_new_tokens``, or as many as there are positions left.

    Raises:
        PromptTooLong: none is left.
    """
    room = room_for_text(model)
    if max(prompt_lengths) >= room:
        raise PromptTooLong(
            f"the prompt takes {max(prompt_lengths)} tokens, visual ones included, and the language model reads {room} "
            "with the answer; ask a shorter question, or train with fewer --num_visual_tokens"
        )
    return [int(min(max_new_tokens, room - length)) for length in prompt_lengths]


def cut_off_line(num_tokens: int, max_new_tokens: int) -> str:
    """What to tell of an answer that was cut off before its end."""
    told = counted(num_tokens, "token")
    if num_tokens < max_new_tokens:
        return f"cut off after {told}: with the prompt, the language model reads no more"
    return f"cut off after {told}; more with --max_new_tokens"
