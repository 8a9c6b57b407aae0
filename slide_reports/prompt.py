"""The text around an image, a question and an answer, and its token ids."""

from dataclasses import dataclass

import jinja2

from slide_vlm import IMAGE_MARKER

DEFAULT_QUESTIONS = {"features": "Write the pathology report of this slide.", "images": "Describe this image."}


@dataclass(frozen=True)
class Prompt:
    """The text around an image, a question and an answer, as literal strings that ``vlm.json`` keeps.

    ``before_image`` <image> ``after_image`` (with ``{question}``) answer ``after_answer``, and for each later turn
    ``next_question`` (with ``{question}``) answer ``after_answer``. A case of several slides or images has
    <image> ``between_images`` <image> … there.
    """

    before_image: str
    after_image: str
    after_answer: str
    next_question: str = "\n{question}\n"
    between_images: str = "\n"

    @classmethod
    def for_tokenizer(cls, tokenizer) -> "Prompt":
        """From the tokenizer's chat template where it has one, else a plain layout."""
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        if not tokenizer.chat_template:
            return cls(bos, "\n{question}\n", eos)
        image, question, answer = "<|image|>", "<|question|>", "<|answer|>"
        turn = [{"role": "user", "content": f"{image}\n{question}"}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        told = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": answer}], tokenize=False)
        before_image, rest = asked.split(image)
        before_question, after_question = rest.split(question)
        after_image = _escape(before_question) + "{question}" + _escape(after_question)
        # Templates end with a newline that no model needs to be taught.
        after_answer = told.split(answer)[1].rstrip() or eos
        turns = [*turn, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        try:
            on = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError:  # a template of one turn only
            return cls(before_image, after_image, after_answer)
        before_next, after_next = on.split(answer)[1].removeprefix(after_answer).split(question)
        return cls(before_image, after_image, after_answer, _escape(before_next) + "{question}" + _escape(after_next))

    def bare_question_ids(self, tokenizer, question: str, max_question_tokens: int) -> list[int]:
        """Ids of the question by itself, by which a reducer may choose patch tokens; a long one loses its end."""
        return tokenizer(question, add_special_tokens=False)["input_ids"][:max_question_tokens]

    def question_ids(self, tokenizer, question: str, max_question_tokens: int, num_images: int = 1) -> list[int]:
        """Ids up to the answer, an :data:`IMAGE_MARKER` for each slide or image; a long question loses its end."""
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        if len(ids) > max_question_tokens:
            question = tokenizer.decode(ids[:max_question_tokens])
        before = tokenizer(self.before_image, add_special_tokens=False)["input_ids"]
        after = tokenizer(self.after_image.format(question=question), add_special_tokens=False)["input_ids"]
        images = [IMAGE_MARKER]
        if num_images > 1:
            between = tokenizer(self.between_images, add_special_tokens=False)["input_ids"]
            images += [*between, IMAGE_MARKER] * (num_images - 1)
        return [*before, *images, *after]

    def next_question_ids(self, tokenizer, question: str, max_question_tokens: int) -> list[int]:
        """Ids from the end of an answer up to the next one; a long question loses its end."""
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        if len(ids) > max_question_tokens:
            question = tokenizer.decode(ids[:max_question_tokens])
        return tokenizer(self.next_question.format(question=question), add_special_tokens=False)["input_ids"]

    def answer_ids(self, tokenizer, answer: str, max_answer_tokens: int) -> list[int]:
        """Ids of the answer and its end; a long answer loses its end, and then has no end token to learn."""
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) > max_answer_tokens:
            return ids[:max_answer_tokens]
        return ids + tokenizer(self.after_answer, add_special_tokens=False)["input_ids"]

    def stop_ids(self, tokenizer, llm) -> list[int]:
        """Ids that end an answer in generation."""
        end = tokenizer(self.after_answer, add_special_tokens=False)["input_ids"][:1]
        configured = llm.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        stops = sorted({i for i in [*end, *configured, tokenizer.eos_token_id] if i is not None})
        if not stops:
            raise ValueError("neither tokenizer nor LLM names a token that ends a text; set the tokenizer's eos_token")
        return stops


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
