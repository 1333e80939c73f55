"""The prompt of a question about one image, the placeholder in it, and the text of the answer.

Letters: M tokens of a prompt.
"""

import torch


def prompt_text(processor, question, num_images=1) -> str:
    """The text of a question about some images, with one placeholder for each: where the question has them, if it has
    as many as there are images, else before it."""
    if question.count(processor.image_token) != num_images:
        return user_prompt(processor, question.replace(processor.image_token, "").strip(), num_images)
    messages = [{"role": "user", "content": question}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def user_prompt(processor, text, num_images=1) -> str:
    """The text of a question about some images that stand before it; whatever control tokens it spells are text."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=True)


def write_prompt(processor, question):
    """input_ids and attention_mask, long[1, M], of a question about one image, with one placeholder for it."""
    text = prompt_text(processor, question)
    special = processor.adds_special_tokens(text)
    return processor.tokenizer(text, add_special_tokens=special, return_tensors="pt")


def expand_placeholder(input_ids: torch.Tensor, image_token_id: int, num_tokens: int) -> torch.Tensor:
    """long[M + num_tokens - 1]: the ids long[M] of a prompt with its placeholder once per visual token.

    [7, 8, image, 9], 3 tokens -> [7, 8, image, image, image, 9]
    """
    return input_ids.repeat_interleave(torch.where(input_ids == image_token_id, num_tokens, 1))


def answer_text(processor, input_ids: torch.Tensor, output: torch.Tensor) -> str:
    """The answer in what `generate` returned, long[1, M + new], for a prompt long[1, M]; what does not print is "\ufffd"."""
    answer = processor.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True).strip()
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in answer)
