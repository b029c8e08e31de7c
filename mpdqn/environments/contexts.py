"""MuJoCo's pictures and the OpenGL contexts that they are drawn in.

A context belongs to one thread at a time, and a thread has one current context or none. Gymnasium makes a simulator's
context current only while it makes it, so that its pictures turn black, without an error, once another simulator is
closed or once another thread draws. `keep_current` makes it current before each picture, which lets simulators in one
thread be; a simulator that may be played from several threads is played in a worker process, which has one.
"""

from __future__ import annotations

from typing import Any


def drawn_by_mujoco(environment: Any) -> bool:
    """Whether a Gymnasium environment draws its pictures in an OpenGL context through its MuJoCo renderer."""
    return hasattr(environment.unwrapped, "mujoco_renderer")


def keep_current(environment: Any) -> None:
    """Have an environment `drawn_by_mujoco` draw, and free what it drew with, in its own context from now on."""
    renderer = environment.unwrapped.mujoco_renderer
    render, close = renderer.render, renderer.close

    def render_in_own(*arguments: Any, **options: Any) -> Any:
        if renderer.viewer is not None:  # else it is made now, and its context with it
            renderer.viewer.make_context_current()
        return render(*arguments, **options)

    def close_in_own() -> None:
        for viewer in renderer._viewers.values():
            # In another's context, the numbers of its textures and lists would name the other's.
            viewer.make_context_current()
            viewer.con.free()
        close()

    renderer.render, renderer.close = render_in_own, close_in_own
