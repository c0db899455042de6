"""django-notifications-hq: `notify.send` to all users at once, as its documentation shows.

`python peer_django.py USERS`: for each line of its input one message to that many users; prints the seconds it took.
"""

import os
import sys
import time

import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

url = conninfo_to_dict(os.environ["DATABASE_URL"])
settings.configure(
    SECRET_KEY="bench",
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "notifications"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url["dbname"],
            "USER": url.get("user", ""),
            "PASSWORD": url.get("password", ""),
            "HOST": url.get("host", ""),
            "PORT": url.get("port", ""),
            "OPTIONS": {"options": "-c search_path=django_peer"},
        }
    },
)
django.setup()

from django.contrib.auth import get_user_model  # noqa: E402  # needs the settings
from django.core.management import call_command  # noqa: E402
from django.db import connection  # noqa: E402
from notifications.models import Notification  # noqa: E402
from notifications.signals import notify  # noqa: E402

with connection.cursor() as cursor:
    cursor.execute("CREATE SCHEMA django_peer")
call_command("migrate", verbosity=0)
users = int(sys.argv[1])
User = get_user_model()
User.objects.bulk_create([User(username=f"member-{number}") for number in range(users)])
author = User.objects.first()
print("ready", flush=True)
for _ in sys.stdin:
    Notification.objects.all().delete()
    began = time.perf_counter()
    notify.send(author, recipient=User.objects.all(), verb="posted", description="gold breaks out")
    took = time.perf_counter() - began
    assert Notification.objects.count() == users
    print(took, flush=True)
