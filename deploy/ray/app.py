"""The reward service as a Ray Serve deployment. Every replica runs the same application; Ray sets their number.

    serve run deploy/ray/serve.yaml

A replica reads its settings from REWARD_* variables, like `plaudit-reward`; serve.yaml sets them. It differs from a
standalone service in two ways. Ray's health check replaces the probes. Reloading is refused, because it would reach
only one replica; redeploy for a new model.
"""

from fastapi import FastAPI
from ray import serve

from plaudit.reward_service.__main__ import api_keys
from plaudit.reward_service.app_factory import app_from_settings
from plaudit.reward_service.settings import Settings


def reward_app() -> FastAPI:
    """Load the model and build the application, once per replica."""
    settings = Settings()
    return app_from_settings(settings, api_keys(settings), reloads=False)


@serve.deployment
@serve.ingress(reward_app)
class Reward:
    """A replica. Ray replaces it if `check_health` fails, and closes it once its requests are answered."""

    app: FastAPI

    def check_health(self) -> None:
        reason = self.app.state.service.engine.unready()
        if reason is not None:
            raise RuntimeError(reason)

    def __del__(self) -> None:
        self.app.state.service.engine.close()


app = Reward.bind()
