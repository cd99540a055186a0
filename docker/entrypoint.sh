#!/bin/sh
# Started as root (by compose), become the owner of the project's folder, or HOST_UID:HOST_GID, so that files
# belong to the person who asked for them. Started as anyone else, just run the command.
set -eu
if [ -n "${HOST_DATA:-}" ]; then export MSCS_DATA=/data; fi
if [ "$(id -u)" = 0 ]; then
  uid=${HOST_UID:-$(stat -c %u .)}
  gid=${HOST_GID:-$(stat -c %g .)}
  if [ "$uid" != 0 ]; then
    # the engine makes missing mounts itself, as root
    for folder in work results .dvc/cache .dvc/tmp /weights; do
      if [ -d "$folder" ] && [ "$(stat -c %u "$folder")" = 0 ]; then chown "$uid:$gid" "$folder"; fi
    done
    exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs "$@"
  fi
fi
exec "$@"
