"""The tasks that the mini model is trained and measured on (ids as in `envs.task_ids()`)."""

from __future__ import annotations

MEMORY = (
    "memory-code",
    "memory-code-3",
    "memory-code-long",
    "memory-code-typed",
    "memory-changed",
    "memory-colour",
    "memory-colour-long",
    "memory-place",
    "memory-order",
    "memory-first",
)
WEB = (
    "click-test",
    "click-test-2",
    "click-button-sequence",
    "click-tab",
    "click-dialog",
    "click-color",
    "click-widget",
    "click-collapsible",
    "identify-shape",
    "grid-coordinate",
    "focus-text",
    "focus-text-2",
    "enter-text",
    "enter-password",
    "login-user",
)
TASKS = MEMORY + WEB
