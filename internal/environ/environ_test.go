package environ

import (
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// expand is what the kubelet does with references: it knows vars, and leaves others as they are.
func expand(value string, vars Env) string {
	s := references(value, func(name string) string {
		if v, ok := vars[name]; ok {
			return strings.ReplaceAll(v, "$", "\x00")
		}
		return "\x00(" + name + ")"
	})
	return strings.ReplaceAll(strings.ReplaceAll(s, "$$", "$"), "\x00", "$")
}

func TestRename(t *testing.T) {
	for value, want := range map[string]string{
		"":                  "",
		"plain":             "plain",
		"$(A)":              "$(P_A)",
		"x$(A)y$(B_1)z":     "x$(P_A)y$(P_B_1)z",
		"$$(A)":             "$$(A)",
		"$$$(A)":            "$$$(P_A)",
		"$(A":               "$(A",
		"$A ${A} $":         "$A ${A} $",
		"$$":                "$$",
		"a $(A.b-c) $(A) (": "a $(P_A.b-c) $(P_A) (",
	} {
		if got := Rename(value, "P_"); got != want {
			t.Errorf("%q: %q, want %q", value, got, want)
		}
	}
}

// What the kubelet makes of the renamed values gives, with the names restored, what it makes of the values themselves.
func TestThereAndBack(t *testing.T) {
	const prefix = Prefix + "0_"
	service := Env{"DB_SERVICE_HOST": "10.0.0.1", "DB_PORT_5432_TCP": "tcp://10.0.0.1:5432"}
	parts := []string{"a", "$(A)", "$$", "$(B)", "$(DB_SERVICE_HOST)", "$(NONE)", "$(", ")", "$", "x y", "$$(A)"}
	for range 2000 {
		app, agent := Env{}, []string{"PATH=/bin", "HOSTNAME=web-0", "DB_SERVICE_HOST=10.0.0.1", "DB_PORT_5432_TCP=tcp://10.0.0.1:5432", "DOPPEL_AGENT_CONFIG={}"}
		seen := Env{}
		known, knownAgent := Env{"DB_SERVICE_HOST": "10.0.0.1", "DB_PORT_5432_TCP": "tcp://10.0.0.1:5432"}, Env{"DB_SERVICE_HOST": "10.0.0.1"}
		for _, name := range []string{"B", "A", "C"} {
			value := ""
			for range rand.IntN(4) {
				value += parts[rand.IntN(len(parts))]
			}
			app[name] = expand(value, known)
			known[name] = app[name]
			knownAgent[prefix+name] = expand(Rename(value, prefix), knownAgent)
			agent = append(agent, prefix+name+"="+knownAgent[prefix+name])
			seen[name] = value
		}
		want := Env{"HOSTNAME": "web-0"}
		for n, v := range service {
			want[n] = v
		}
		for n, v := range app {
			want[n] = v
		}
		if got := Collect(agent, prefix); !cmp.Equal(got, want) {
			t.Fatalf("%v: %s", seen, cmp.Diff(want, got))
		}
	}
}

func TestOver(t *testing.T) {
	hostile := Env{
		"PATH": "/app", "LD_PRELOAD": "/x", "LD_AUDIT": "/x", "LD_PROFILE_OUTPUT": "/x", "DYLD_INSERT_LIBRARIES": "/x", "GCONV_PATH": "/x", "BASH_ENV": "/x", "BASH_FUNC_ls%%": "() { evil; }",
		"PROMPT_COMMAND": "evil", "PS4": "$(evil)", "ZDOTDIR": "/x", "FPATH": "/x", "SHELLOPTS": "xtrace", "A=PATH": "x", "": "x", "N\x00": "x", "V": "x\x00",
	}
	e := Env{"A": "1", "Z": "2", "ENV": "staging"}
	maps.Copy(e, hostile)
	got := e.Local().Over([]string{"PATH=/usr/bin", "A=0", "B=b"})
	if want := []string{"PATH=/usr/bin", "B=b", "A=1", "ENV=staging", "Z=2"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	for _, file := range []string{"/x", "$HOME/x", "`evil`"} {
		if left := (Env{"ENV": file}).Local(); len(left) != 0 {
			t.Errorf("%q", left)
		}
	}
}

func TestFormat(t *testing.T) {
	e := Env{"A": "it's $HOME", "B": "two\nlines!", "c.d": "100%"}
	for syntax, want := range map[string]string{
		"docker":     "A=it's $HOME\nc.d=100%\n",
		"compose":    "A=\"it's \\$HOME\"\nB=\"two\\nlines!\"\nc.d='100%'\n",
		"sh":         "A='it'\\''s $HOME'\nB='two\nlines!'\n",
		"sh:export":  "export A='it'\\''s $HOME'\nexport B='two\nlines!'\n",
		"csh":        "set A='it'\\''s $HOME'\nset B='two\\\nlines\\!'\n",
		"csh:export": "setenv A 'it'\\''s $HOME'\nsetenv B 'two\\\nlines\\!'\n",
		"ps":         "$A='it''s $HOME'\n$B='two\nlines!'\n${c.d}='100%'\n",
		"ps:export":  "$Env:A='it''s $HOME'\n$Env:B='two\nlines!'\n${Env:c.d}='100%'\n",
		"cmd":        "set \"A=it's $HOME\"\nset \"c.d=100%%\"\n",
	} {
		got, left, err := e.Format(syntax)
		if err != nil || got != want || len(left) != len(e)-strings.Count(want, "A=")-strings.Count(want, "A '")-strings.Count(want, "B=")-strings.Count(want, "B '")-strings.Count(want, "c.d") {
			t.Errorf("%s: %q, %v, %v\nwant %q", syntax, got, left, err, want)
		}
	}
	if _, _, err := e.Format("fish"); err == nil || !strings.Contains(err.Error(), "sh:export") {
		t.Error(err)
	}
}

// Whoever writes a pod template writes no commands into the file, by neither names nor values.
func TestFormatOfHostile(t *testing.T) {
	e := Env{"x}; evil; ${y": "", "A\nevil": "", "A=1;evil #": "", "A & evil": "", `A" & evil & "`: "", "A`B": "", "$(evil)": "", "#A": "", "": "", "A": `" & evil & "`}
	for _, syntax := range Syntaxes {
		text, left, err := e.Format(syntax)
		if err != nil || len(left) != len(e)-1 || strings.Count(text, "\n") != 1 {
			t.Errorf("%s: %q, %q, %v", syntax, text, left, err)
		}
	}
	if text, _, _ := e.Format("cmd"); text != "set A=^\" ^& evil ^& ^\"\n" {
		t.Errorf("%q", text)
	}
}

// FuzzFormat: each line of what is for one variable a line sets that variable, and nothing else.
func FuzzFormat(f *testing.F) {
	f.Add("A", "it's $HOME")
	f.Add("c.d", "100%\n")
	f.Add("x}; evil; ${y", `" & evil & "`)
	f.Add("A", "\u2019; evil; \u2018")
	f.Fuzz(func(t *testing.T, name, value string) {
		e := Env{name: value}
		for _, syntax := range Syntaxes {
			text, left, err := e.Format(syntax)
			if err != nil || (text == "") != (len(left) == 1) {
				t.Fatalf("%s: %q, %q, %v", syntax, text, left, err)
			}
			if text == "" {
				continue
			}
			text, ends := strings.CutSuffix(text, "\n")
			body, found := "", false
			for _, before := range []string{"export ", "setenv ", "set \"", "set ", "$Env:", "${Env:", "${", "$", ""} {
				if body, found = strings.CutPrefix(text, before+name); found {
					break
				}
			}
			body = strings.TrimLeft(strings.TrimPrefix(body, "}"), "= ")
			ok := ends && found
			switch syntax {
			case "docker":
				ok = ok && !strings.ContainsAny(text, "\r\n")
			case "cmd":
				quoted := strings.HasPrefix(text, `set "`)
				ok = ok && !strings.ContainsAny(text, "\r\n") && (quoted && strings.Count(text, `"`) == 2 || !quoted && !bare.MatchString(body))
			case "sh", "sh:export", "csh", "csh:export": // pieces in quotes, and between them characters behind a backslash
				ok = ok && pieces.MatchString(body)
			case "compose":
				ok = ok && composed.MatchString(body)
			case "ps", "ps:export":
				ok = ok && typeset.MatchString(body)
			}
			if !ok {
				t.Errorf("%s: %q", syntax, text)
			}
		}
	})
}

var (
	bare     = regexp.MustCompile(`^(?:[^\^]|\^.)*?[&|<>()"]`)
	pieces   = regexp.MustCompile(`(?s)^('[^']*'|\\.)*$`)
	typeset  = regexp.MustCompile(`(?s)^'([^'\x{2018}-\x{201b}]|''|\x{2018}{2}|\x{2019}{2}|\x{201a}{2}|\x{201b}{2})*'$`)
	composed = regexp.MustCompile(`(?s)^('[^'\r\n\\]*'|"([^"\\]|\\.)*")$`)
)

// A shell that reads the file has the values, whatever is in them.
func TestShellReadsIt(t *testing.T) {
	for syntax, command := range map[string][]string{
		"sh:export":  {"sh", "-c", `. "$0"; env -0`},
		"csh:export": {"csh", "-fc", `source $1; env -0`},
	} {
		highest := 255
		if command[0] == "csh" {
			highest = 126 // it has uses of its own for other bytes (csh(1))
		}
		e := Env{}
		for _, n := range []string{"A", "B_1", "_c"} {
			b := make([]byte, 200)
			for i := range b {
				b[i] = byte(1 + rand.IntN(highest))
			}
			e[n] = string(b)
		}
		if _, err := exec.LookPath(command[0]); err != nil {
			t.Logf("%s is not installed", command[0])
			continue
		}
		text, _, err := e.Format(syntax)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "env")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(command[0], append(command[1:], file)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		for n, v := range e {
			if !slices.Contains(strings.Split(string(out), "\x00"), n+"="+v) {
				t.Errorf("%s: %s is not %q", syntax, n, v)
			}
		}
	}
}

func FuzzRename(f *testing.F) {
	f.Add("a$(B)$$(C)$(")
	f.Fuzz(func(t *testing.T, s string) {
		if strings.Contains(s, "\x00") {
			return
		}
		if got, want := restore(expand(Rename(s, "P_"), nil), "P_", nil), expand(s, nil); got != want && !strings.Contains(s, "P_") {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	})
}
