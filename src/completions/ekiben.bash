# Completions of ekiben(1) for bash.

# the first column of a table, below its head in capital letters; what is no row is indented, or ends in a colon
_ekiben_names() {
    "$@" 2> /dev/null | awk '/^[A-Z]/ { rows = 1; next } rows && /^[^ ]/ && $1 !~ /:$/ { print $1 }'
}

_ekiben() {
    local word=${COMP_WORDS[COMP_CWORD]} before="${COMP_WORDS[*]:1:COMP_CWORD-1}" words= options=
    local instances="_ekiben_names ekiben status" hosts="_ekiben_names ekiben fleet status --once"
    case $before in
        "") words="trigger hold resume rollback status log check forget-releases fleet" options="--config --help --version" ;;
        check | *--config | *--repository | *--directory)
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
            return ;;
        trigger*) words=$($instances) options="--wait" ;;
        status*) words=$($instances) options="--json" ;;
        log*) words=$($instances) options="--follow" ;;
        hold*) words=$($instances) options="--reason" ;;
        forget-releases | resume | rollback) words=$($instances) ;;
        fleet)
            words="init build deploy hold resume abort renew status history log diff flake-update bootstrap collect"
            options="--repository --directory --help" ;;
        "fleet build") words="dry-build build test switch $($hosts)" options="--jobs --target" ;;
        "fleet build"*) words=$($hosts) options="--jobs --target" ;;
        "fleet deploy"*) words=$($hosts) options="--waves --again --no-build --unsigned --json --jobs" ;;
        "fleet hold"*) words=$($hosts) options="--for --reason" ;;
        "fleet abort"*) options="--unsigned" ;;
        "fleet collect"*) options="--html --metrics" ;;
        "fleet status"*) words=$($hosts) options="--json --html --wide --once" ;;
        "fleet history"*) words=$($hosts) options="--json" ;;
        "fleet renew"*) words=$($hosts) options="--jobs" ;;
        "fleet log"*) words=$($hosts) ;;
        "fleet resume"* | "fleet diff"* | "fleet flake-update"*) words=$($hosts) ;;
    esac
    [[ $word != -* ]] || words=$options
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}

complete -F _ekiben ekiben
