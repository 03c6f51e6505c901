#!/usr/bin/env bash
# The demo: a lab with the sample application, and doppel's walkthrough on it with the real output of every command. It is a
# test as well: it ends with one clear line and exit code 1 at the first step that does not give what it should.
#
#   hack/demo.sh         start it; when it is up, set it back and start again (make demo)
#   hack/demo.sh down    end it and remove it (make demo-down)
set -euo pipefail
cd "$(dirname "$0")/.."
readonly name=demo ns=demo manifests=examples/colors/k8s.yaml
readonly api_wait=90 page_wait=10 # seconds
readonly relay=https://relay.test relay_data=/var/lib/doppel-lab/$name/relay # goes with the lab

lab() { bin/lab --name "$name" "$@"; }
exec 3>&1 # where the audience looks, inside $(…) too
out='' setup=''
bold='' plain=''
if [[ -t 1 && -z ${NO_COLOR-} ]]; then bold=$'\e[1m' plain=$'\e[0m'; fi

say() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain" >&3; }

fail() {
  printf '\ndemo: error: %s\n' "$*" >&2
  if lab status &>/dev/null; then printf 'demo: hint: the lab is left as it is for a look; end it with: make demo-down\n' >&2; fi
  exit 1
}

# show prints what it reads, whole lines only, and passes it on.
show() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line" >&3
    printf '%s\n' "$line"
  done
}

# run COMMAND [PART...] runs a command on the laptop and shows it with its output, in which every PART has to be. It sets $out to it.
run() {
  local command=$1 part
  shift
  printf '%s$ %s%s\n' "$bold" "$command" "$plain" >&3
  out=$(lab laptop exec "$name" -- bash -c "$command" </dev/null 2>&1 | show) || fail "this command failed: $command"
  for part in "$@"; do
    [[ $out == *"$part"* ]] || fail "the output of this command lacks '$part': $command"
  done
}

# until_seen SECONDS WANT COMMAND... repeats a command until its output has WANT.
until_seen() {
  local end=$((SECONDS + $1)) want=$2
  shift 2
  until [[ $("$@" 2>/dev/null) == *"$want"* ]]; do
    ((SECONDS < end)) || return 1
    sleep 0.3
  done
}

# api METHOD PATH [CURL-OPTION...] is one request to the API server as the administrator: a bare machine has no kubectl.
api() {
  local method=$1 path=$2
  shift 2
  curl -sS --noproxy '*' --max-time 10 --fail-with-body --cacert "$tmp/ca" --cert "$tmp/cert" --key "$tmp/key" -X "$method" "$@" "$server$path"
}

# credentials takes the administrator's certificates out of the lab's kubeconfig.
credentials() {
  local config
  config=$(lab kubeconfig)
  field() { sed -n "s/^ *$1: *//p" <<<"$config"; }
  server=$(field server)
  field certificate-authority-data | base64 -d >"$tmp/ca"
  field client-certificate-data | base64 -d >"$tmp/cert"
  field client-key-data | base64 -d >"$tmp/key"
}

# apply FILE does what kubectl apply --server-side -n $ns -f FILE does, for Deployments and Services.
apply() {
  local object kind object_name path
  api PATCH "/api/v1/namespaces/$ns?fieldManager=demo" -H 'Content-Type: application/apply-patch+yaml' \
    -d "{apiVersion: v1, kind: Namespace, metadata: {name: $ns}}" >/dev/null
  while IFS= read -r -d $'\f' object; do
    kind=$(sed -n 's/^kind: *//p' <<<"$object")
    object_name=$(sed -n '/^metadata:/,/^spec:/s/^  name: *//p' <<<"$object")
    case $kind in
    Deployment) path=/apis/apps/v1/namespaces/$ns/deployments ;;
    Service) path=/api/v1/namespaces/$ns/services ;;
    *) fail "$1: cannot apply kind '$kind'" ;;
    esac
    api PATCH "$path/$object_name?fieldManager=demo&force=true" -H 'Content-Type: application/apply-patch+yaml' \
      --data-binary "$object" >/dev/null || fail "could not apply $kind $object_name"
    printf '%s %s applied\n' "$kind" "$object_name"
  done < <(sed $'s/^---$/\f/; $a\\\n\f' "$1")
}

# packages installs what is missing of what the demo itself uses; the lab sees to its own.
packages() {
  local missing=()
  command -v make >/dev/null || missing+=(make)
  command -v curl >/dev/null || missing+=(curl)
  command -v nslookup >/dev/null || missing+=(bind9-dnsutils)
  [[ -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)
  ((${#missing[@]})) || return 0
  say "Installing ${missing[*]}"
  command -v apt-get >/dev/null || fail "these packages are missing, and there is no apt-get: ${missing[*]}"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"; } >"$tmp/apt" 2>&1 ||
    fail "apt-get could not install ${missing[*]}: $(tail -n 1 "$tmp/apt")"
}

machine() {
  [[ $(uname -s) == Linux ]] || fail "the demo needs Linux"
  [[ $EUID == 0 ]] || fail "the demo makes network namespaces: run it as root (sudo make demo)"
  command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin # sudo takes it out of PATH
  command -v go >/dev/null || fail "there is no go: install Go from https://go.dev/dl"
  packages
}

start() {
  say "Building the programs and the images"
  # Root, in a directory of somebody else: git would not tell the commit, and go would fail for that.
  GOFLAGS="${GOFLAGS-} -buildvcs=false" make -s build images || fail "the build failed"

  if lab status &>/dev/null; then
    say "The demo is up: setting it back to the start"
    end_relay
    { lab laptop exec "$name" -- doppel uninstall --everything </dev/null && lab laptop rm "$name"; } || lab down
  fi
  say "Starting a Kubernetes of its own (the first time this builds it, which takes some minutes)"
  lab up || fail "the lab did not start"
  lab load dist/*.tar || fail "the images could not be loaded"
  lab laptop add "$name" || fail "the laptop could not be made"

  say "The sample application: verylargejavaservice asks dataprocessingservice, which asks verylargedatastore"
  credentials
  apply "$manifests"
  until_seen $api_wait '"orders": 3127' api GET "/api/v1/namespaces/$ns/services/verylargejavaservice:8080/proxy/state" ||
    fail "the sample application does not answer after $api_wait s"
}

walkthrough() {
  say "On the laptop, which reaches the API server's address and nothing else: connect. The cluster has no traffic-manager yet"
  run "doppel connect -n $ns" "Connected to context lab-$name, namespace $ns (https://"

  say "Services answer by their cluster names, as in a pod"
  run "curl -sk https://kubernetes.default" '"kind": "Status"'
  run "nslookup kubernetes.default" "Address: 10.96.0.1"
  run "curl -s dataprocessingservice.$ns:3000/color" '"green"'
  run "doppel list" "dataprocessingservice: ready to intercept"

  say "The same service on the laptop, in blue; intercept it"
  run "setsid colors -color blue -addr 127.0.0.1:3000 dataprocessingservice >~/colors.log 2>&1 &"
  until_seen $page_wait '"blue"' lab laptop exec "$name" -- curl -s 127.0.0.1:3000/color || fail "the local process does not answer"
  run "doppel intercept dataprocessingservice -p 3000" "State          : ACTIVE"

  say "A pod of the cluster, verylargejavaservice, asks dataprocessingservice for its colour: the laptop answers"
  run "curl -s verylargejavaservice.$ns:8080/color" '"blue"'
  run "doppel list" "dataprocessingservice: intercepted"

  say "The local process changes its colour, and the cluster sees it at once"
  run "curl -s -X POST '127.0.0.1:3000/color?c=orange'" '"orange"'
  run "curl -s verylargejavaservice.$ns:8080/color" '"orange"'
}

# start_relay runs a relay outside the cluster, and sets $setup to the link that makes its first account.
start_relay() {
  rm -rf "$relay_data" && mkdir -p "$relay_data"
  setsid bin/lab --name "$name" outside exec -- sh -c 'echo $$ >"$0/pid"; exec "$@" >"$0/out" 2>"$0/log"' \
    "$relay_data" "$PWD/bin/doppel-relay" -url "$relay" -data "$relay_data" </dev/null &>/dev/null 3>&- &
  until_seen $page_wait "$relay/setup" cat "$relay_data/out" || fail "the relay did not start: $(tail -n 1 "$relay_data/log")"
  setup=$(grep -o "$relay/setup.*" "$relay_data/out")
}

end_relay() {
  [[ ! -e $relay_data/pid ]] || lab outside exec -- kill "$(<"$relay_data/pid")" 2>/dev/null || true
}

# browser PATH [CURL-OPTION...] is what a person does on the relay's pages, with curl in the place of a browser.
browser() {
  lab laptop exec "$name" -- bash -c 'curl -sS --fail --max-time 10 --cacert ~/ca.pem -c ~/cookies -b ~/cookies -H "Origin: $0" -H "Sec-Fetch-Site: same-origin" "$0$@"' \
    "$relay" "$@" </dev/null
}

preview() {
  local login token secret link
  say "A relay of one's own, outside the cluster, shows previews to people with a link. Its first account is made in a browser (here with curl)"
  start_relay
  lab laptop exec "$name" -- bash -c "cp $relay_data/ca.pem ~/" </dev/null
  browser /setup -L -d "token=${setup#*token=}&email=ada@example.com&team=crew&password=correct horse battery" >/dev/null || fail "no account was made"
  say "Log the laptop in; the link can be opened anywhere"
  printf '%s$ doppel login %s --ca-file ~/ca.pem%s\n' "$bold" "$relay" "$plain"
  lab laptop exec "$name" -- bash -c "doppel login $relay --ca-file ~/ca.pem --no-browser" </dev/null &>"$tmp/login" 3>&- &
  login=$!
  until_seen $page_wait "shows the code" cat "$tmp/login" || fail "doppel login said: $(<"$tmp/login")"
  browser /device -d "allow=yes&code=$(sed -n 's/.*shows the code //p' "$tmp/login")" >/dev/null || fail "the login was not allowed"
  wait "$login" || fail "doppel login said: $(<"$tmp/login")"
  cat "$tmp/login"

  say "The cluster joins: its traffic-manager dials out to the relay"
  out=$(lab laptop exec "$name" -- doppel relay add-cluster demo -o json </dev/null) || fail "the cluster was not added"
  token=$(sed -n 's/.*"token": "\(.*\)".*/\1/p' <<<"$out")
  secret="{apiVersion: v1, kind: Secret, metadata: {name: doppel-relay}, data: {token: $(printf %s "$token" | base64 -w0), ca.crt: $(base64 -w0 "$relay_data/ca.pem")}}"
  api PATCH "/api/v1/namespaces/doppel/secrets/doppel-relay?fieldManager=demo&force=true" -H 'Content-Type: application/apply-patch+yaml' -d "$secret" >/dev/null ||
    fail "the cluster's token could not be stored"
  run "doppel helm upgrade --set relay.url=$relay" "upgrade done"

  say "A link to the laptop's version; everybody else goes on to see the cluster's own"
  run "doppel leave dataprocessingservice"
  run "curl -s -X POST '127.0.0.1:3000/color?c=blue'" '"blue"'
  run "doppel intercept dataprocessingservice -p 3000 --preview-url --ingress-host verylargejavaservice.$ns --ingress-port 8080" "Preview URL"
  link=$(grep -o 'https://[^ ]*' <<<"$out")
  run "doppel preview publish dataprocessingservice --for 1h" "everybody who has the link"
  run "curl -s --cacert ~/ca.pem ${link}color" '"blue"'
  run "curl -s verylargejavaservice.$ns:8080/color" '"green"'
}

main() {
  machine
  start
  walkthrough
  preview
  say "All of it is running"
  cat <<END
A shell on the laptop : bin/lab --name $name laptop exec $name -- bash
There, for example    : doppel status; doppel leave dataprocessingservice; curl verylargejavaservice.$ns:8080/color
The end               : make demo-down
END
}

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
case ${1-up} in
up) main ;;
down) [[ ! -x bin/lab ]] || lab down || fail "the lab could not be removed" ;;
*)
  printf 'usage: hack/demo.sh [up|down]\n' >&2
  exit 2
  ;;
esac
