from django.apps import AppConfig


class MailConfig(AppConfig):
    name = "mail"

    def ready(self) -> None:
        from proj.celery import resilience

        resilience.breaker("mail", open_duration=5)
