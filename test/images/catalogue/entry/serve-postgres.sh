#!/bin/sh
# Runs PostgreSQL. The first time, it makes the database POSTGRES_DB of the user
# POSTGRES_USER with POSTGRES_PASSWORD, and runs what is in /init/*.sql there.
# Nobody is let in over the network before that is done.
set -eu
bin=/usr/lib/postgresql/15/bin

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  : "${POSTGRES_PASSWORD:?set a password}"
  user=${POSTGRES_USER:-postgres}
  # A start that was cut short leaves no half of a database.
  rm -rf "$PGDATA.new"
  echo "$POSTGRES_PASSWORD" >/tmp/password
  "$bin/initdb" -D "$PGDATA.new" --username="$user" --pwfile=/tmp/password \
    --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --locale=C --no-sync >/dev/null
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$PGDATA.new/pg_hba.conf"
  printf "listen_addresses = '*'\njit = off\nunix_socket_directories = '/tmp'\n" >>"$PGDATA.new/postgresql.conf"
  "$bin/pg_ctl" -D "$PGDATA.new" -o "-c listen_addresses=" -w start >/dev/null
  if [ "${POSTGRES_DB:-postgres}" != postgres ]; then
    "$bin/createdb" -h /tmp -U "$user" "$POSTGRES_DB"
  fi
  for script in /init/*.sql; do
    [ ! -e "$script" ] || "$bin/psql" -q -v ON_ERROR_STOP=1 -h /tmp -U "$user" -d "${POSTGRES_DB:-postgres}" -f "$script"
  done
  "$bin/pg_ctl" -D "$PGDATA.new" -m fast -w stop >/dev/null
  mv "$PGDATA.new" "$PGDATA"
fi
exec "$bin/postgres" -D "$PGDATA" "$@"
