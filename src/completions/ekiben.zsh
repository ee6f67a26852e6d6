#compdef ekiben
# Completions of ekiben(1) for zsh.

# the first column of a table, below its head in capital letters; what is no row is indented, or ends in a colon
_ekiben_names() {
    "$@" 2> /dev/null | awk '/^[A-Z]/ { rows = 1; next } rows && /^[^ ]/ && $1 !~ /:$/ { print $1 }'
}

_ekiben() {
    local before="${words[2,CURRENT-1]}"
    local -a instances=(_ekiben_names ekiben status) hosts=(_ekiben_names ekiben fleet status --once) found options
    case $before in
        "")
            found=(trigger hold resume rollback status log check forget-releases fleet)
            options=(--config --help --version) ;;
        check | *--config | *--repository | *--directory) _files; return ;;
        trigger*) found=($($instances)) options=(--wait) ;;
        status*) found=($($instances)) options=(--json) ;;
        log*) found=($($instances)) options=(--follow) ;;
        hold*) found=($($instances)) options=(--reason) ;;
        forget-releases | resume | rollback) found=($($instances)) ;;
        fleet)
            found=(init build deploy hold resume abort renew status history log diff flake-update bootstrap collect)
            options=(--repository --directory --help) ;;
        "fleet build") found=(dry-build build test switch $($hosts)) options=(--jobs --target) ;;
        "fleet build"*) found=($($hosts)) options=(--jobs --target) ;;
        "fleet deploy"*) found=($($hosts)) options=(--waves --again --no-build --unsigned --json --jobs) ;;
        "fleet hold"*) found=($($hosts)) options=(--for --reason) ;;
        "fleet abort"*) options=(--unsigned) ;;
        "fleet collect"*) options=(--html --metrics) ;;
        "fleet status"*) found=($($hosts)) options=(--json --html --wide --once) ;;
        "fleet history"*) found=($($hosts)) options=(--json) ;;
        "fleet renew"*) found=($($hosts)) options=(--jobs) ;;
        "fleet log"*) found=($($hosts)) ;;
        "fleet resume"* | "fleet diff"* | "fleet flake-update"*) found=($($hosts)) ;;
    esac
    [[ ${words[CURRENT]} != -* ]] || found=($options)
    compadd -- $found
}

_ekiben "$@"
