// Package environ owns how an app's environment travels: renamed into the agent's own, back, and into files and processes of the laptop.
package environ

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// Env is an environment.
type Env map[string]string

// Prefix is put before the names of a container's variables among the agent's own, with the container's number and an underscore behind it.
const Prefix = "DOPPEL_ENV_"

// Rename renames the references to variables in a value of a container's env: $(VAR) becomes $(prefixVAR). It reads them as the kubelet does:
// $$ stands for a dollar sign, and what is not closed is no reference (api/core/v1, EnvVar.Value).
func Rename(value, prefix string) string {
	return references(value, func(name string) string { return "$(" + prefix + name + ")" })
}

// references replaces each reference.
func references(value string, with func(name string) string) string {
	var out strings.Builder
	for i := 0; i < len(value); i++ {
		if value[i] != '$' || i+1 == len(value) {
			out.WriteByte(value[i])
			continue
		}
		end := strings.IndexByte(value[i:], ')')
		switch {
		case value[i+1] == '(' && end > 0:
			out.WriteString(with(value[i+2 : i+end]))
			i += end
		default: // $$ included, whose second dollar sign begins nothing
			out.WriteString(value[i : i+2])
			i++
		}
	}
	return out.String()
}

// service are the variables that the kubelet makes of services, in Docker's manner, for every container of a pod.
var service = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^[A-Z0-9_]+_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)?)$`)
})

// Collect finds a container's environment among the variables of the agent, as os.Environ has them: those with its prefix, those of
// services, and the pod's host name.
func Collect(environ []string, prefix string) Env {
	services, out := Env{}, Env{}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, Prefix) && (service().MatchString(name) || name == "HOSTNAME") {
			services[name], out[name] = value, value
		}
	}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		if name, ok := strings.CutPrefix(name, prefix); ok {
			out[name] = restore(value, prefix, services)
		}
	}
	return out
}

// restore gives the references that the kubelet could not resolve their names back: they are to nothing, or to a service's variable.
func restore(value, prefix string, services Env) string {
	if !strings.Contains(value, "$("+prefix) {
		return value
	}
	var out strings.Builder
	for {
		before, rest, found := strings.Cut(value, "$("+prefix)
		out.WriteString(before)
		if !found {
			return out.String()
		}
		name, after, closed := strings.Cut(rest, ")")
		switch v, ok := services[name]; {
		case !closed:
			out.WriteString("$(" + rest)
			return out.String()
		case ok:
			out.WriteString(v)
		default:
			out.WriteString("$(" + name + ")")
		}
		value = after
	}
}

// local are the variables that say where a process runs, and what its loader (ld.so(8), dyld(1), iconv) and its shell (bash(1), zsh(1)) load or run: the
// laptop's own stay.
var (
	local = []string{
		"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "SHLVL", "TERM", "TMPDIR", "_",
		"GCONV_PATH", "BASH_ENV", "BASHOPTS", "SHELLOPTS", "PROMPT_COMMAND", "PS0", "PS1", "PS2", "PS3", "PS4", "ZDOTDIR", "FPATH",
	}
	localPrefixes = []string{"LD_", "DYLD_", "BASH_FUNC_"}
)

func isLocal(name, value string) bool {
	return slices.Contains(local, name) || slices.ContainsFunc(localPrefixes, func(p string) bool { return strings.HasPrefix(name, p) }) ||
		name == "ENV" && strings.ContainsAny(value, "/$`") // sh runs that file; of an app it is the name of where it runs
}

// Local returns e without the variables of which a laptop has its own, and without what no process can have (environ(7)): a pod's agent says what
// it likes.
func (e Env) Local() Env {
	out := maps.Clone(e)
	maps.DeleteFunc(out, func(n, v string) bool {
		return n == "" || strings.ContainsAny(n, "=\x00") || strings.Contains(v, "\x00") || isLocal(n, v)
	})
	return out
}

// Over lays e over the environment of a process.
func (e Env) Over(environ []string) []string {
	out := slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		_, ok := e[name]
		return ok
	})
	for _, name := range e.names() {
		out = append(out, name+"="+e[name])
	}
	return out
}

func (e Env) names() []string { return slices.Sorted(maps.Keys(e)) }
