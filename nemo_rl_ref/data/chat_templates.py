# SPDX-License-Identifier: Apache-2.0
"""Chat templates that a configuration can ask for without writing them out."""


class COMMON_CHAT_TEMPLATES:  # NeMo RL's name
    """Jinja templates. NeMo RL's ``simple_role_header`` is left out: no configuration uses it."""

    #: The contents, joined.
    passthrough_prompt_response = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
