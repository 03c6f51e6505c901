package environ

import (
	"fmt"
	"regexp"
	"strings"
)

// Syntaxes are the ways to write an environment to a file.
var Syntaxes = []string{"docker", "compose", "sh", "sh:export", "csh", "csh:export", "ps", "ps:export", "cmd"}

// identifier is what a shell takes as a variable's name (POSIX, Base Definitions, 3.216).
var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// plain is a name that means nothing but itself in all other Syntaxes. Kubernetes lets names be nearly anything (KEP-4369), and whoever writes a pod
// template must not write commands into what people of the workload run.
var plain = regexp.MustCompile(`^[A-Za-z_.-][A-Za-z0-9_.-]*$`)

// Format writes e in one of the Syntaxes, sorted by name. Left are the names of variables that it has no way to write: those with a line
// break in docker and cmd, those whose name is none for a shell, and elsewhere those whose name is not plain.
func (e Env) Format(syntax string) (text string, left []string, err error) {
	line, ok := lines[syntax]
	if !ok {
		return "", nil, fmt.Errorf("unknown syntax %q: want one of %s", syntax, strings.Join(Syntaxes, ", "))
	}
	var out strings.Builder
	for _, name := range e.names() {
		if s := line(name, e[name]); s != "" && plain.MatchString(name) {
			out.WriteString(s + "\n")
		} else {
			left = append(left, name)
		}
	}
	return out.String(), left, nil
}

var lines = map[string]func(name, value string) string{
	"docker": func(n, v string) string { // no quotes; https://docs.docker.com/reference/cli/docker/container/run/#env
		if strings.ContainsAny(v, "\r\n") {
			return ""
		}
		return n + "=" + v
	},
	"compose": func(n, v string) string { // https://docs.docker.com/compose/how-tos/environment-variables/variable-interpolation/#env-file-syntax
		if !strings.ContainsAny(v, "'\r\n\\") {
			return n + "='" + v + "'"
		}
		return n + `="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "\n", `\n`, "\r", `\r`).Replace(v) + `"`
	},
	"sh":         shell(""),
	"sh:export":  shell("export "),
	"csh":        csh("set ", "="),
	"csh:export": csh("setenv ", " "),
	"ps": func(n, v string) string {
		return "$" + braced(n) + "='" + doubled.Replace(v) + "'"
	},
	"ps:export": func(n, v string) string {
		return "$" + braced("Env:"+n) + "='" + doubled.Replace(v) + "'"
	},
	"cmd": func(n, v string) string { // a batch file; https://learn.microsoft.com/windows-server/administration/windows-commands/set_1
		if strings.ContainsAny(v, "\r\n") {
			return ""
		}
		if strings.Contains(v, `"`) { // which would end the quotes: what follows could be commands
			return "set " + n + "=" + carets.Replace(v)
		}
		return `set "` + n + "=" + strings.ReplaceAll(v, "%", "%%") + `"`
	},
}

// doubled doubles what PowerShell takes for a quote; typographic ones are (about_Quoting_Rules).
var doubled = strings.NewReplacer("'", "''", "\u2018", "\u2018\u2018", "\u2019", "\u2019\u2019", "\u201a", "\u201a\u201a", "\u201b", "\u201b\u201b")

// carets keeps the characters from cmd that mean something outside quotes.
var carets = strings.NewReplacer(`"`, `^"`, "^", "^^", "&", "^&", "|", "^|", "<", "^<", ">", "^>", "(", "^(", ")", "^)", "%", "%%")

// braced is a PowerShell variable's name, in braces where it is no word.
func braced(name string) string {
	if identifier.MatchString(strings.TrimPrefix(name, "Env:")) {
		return name
	}
	return "{" + name + "}"
}

func shell(before string) func(n, v string) string {
	return func(n, v string) string {
		if !identifier.MatchString(n) {
			return ""
		}
		return before + n + "='" + strings.ReplaceAll(v, "'", `'\''`) + "'"
	}
}

// csh quotes as csh(1) wants it: an exclamation mark is history also in quotes, and a line break needs a backslash.
func csh(before, is string) func(n, v string) string {
	quote := strings.NewReplacer("'", `'\''`, "!", `\!`, "\n", "\\\n")
	return func(n, v string) string {
		if !identifier.MatchString(n) {
			return ""
		}
		return before + n + is + "'" + quote.Replace(v) + "'"
	}
}
