package config

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func TestParse(t *testing.T) {
	for name, tt := range map[string]struct {
		text string
		want Config
	}{
		"empty":    {"", Config{}},
		"comments": {"# nothing\n", Config{}},
		"null":     {"connect:\noutput: ~\n", Config{}},
		"all kinds": {
			"output: json\nlogLevel: debug\nconnect:\n  context: prod\n  managerNamespace: tools\nintercept: {address: 10.0.0.1, timeout: 90s}\n",
			Config{
				Output: "json", LogLevel: "debug", Connect: localapi.ConnectRequest{Context: "prod", ManagerNamespace: "tools"},
				Intercept: Intercept{Address: "10.0.0.1", Timeout: Duration(90 * time.Second)},
			},
		},
		"a number as a name": {"connect: {context: 1, namespace: 007}", Config{Connect: localapi.ConnectRequest{Context: "1", Namespace: "007"}}},
		"an alias":           {"connect: {context: &c prod, namespace: *c}", Config{Connect: localapi.ConnectRequest{Context: "prod", Namespace: "prod"}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(tt.text))
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"unknown key":            {"output: json\ncolour: blue\n", "line 2: unknown key colour"},
		"near miss":              {"connect:\n  contxt: prod\n", "line 2: unknown key connect.contxt; did you mean context?"},
		"near miss, case":        {"connect: {managernamespace: x}", "did you mean managerNamespace?"},
		"key of another section": {"context: prod", "line 1: unknown key context; did you mean connect?"},
		"twice":                  {"output: json\noutput: yaml", "line 2: output is there twice"},
		"a list for a section":   {"connect: [a]", "line 1: connect: want keys and values below it"},
		"a section for a name":   {"connect:\n  context: {a: b}", "line 2: connect.context: object is not a text"},
		"a time without unit":    {"intercept: {timeout: 5}", "line 1: intercept.timeout: "},
		"a time of nothing":      {"intercept: {timeout: 0s}", "want a time above zero"},
		"a wrong word":           {"logLevel: loud", `logLevel "loud": want error, warn, info or debug`},
		"a wrong format":         {"output: xml", `output "xml": want text, json or yaml`},
		"not YAML":               {"a: [", "line 1"},
		"several":                {"colour: x\nsize: y", "line 2: unknown key size"},
		"a bare text":            {"hello", "want keys and values"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(tt.text))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if c, err := Load(filepath.Join(dir, "none")); err != nil || !reflect.DeepEqual(c, Config{}) {
		t.Errorf("no file: %+v, %v", c, err)
	}
	file := filepath.Join(dir, "config.yaml")
	for text, want := range map[string]string{"output: json": "", "outptu: json": "config.yaml: line 1", strings.Repeat("#", maxFile+1): "more than"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Load(file)
		if want == "" {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if e := uerr.From(err); e == nil || e.Kind != uerr.Usage || !strings.Contains(e.Msg, want) || e.Hint == "" {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if _, err := Load(dir); err == nil {
		t.Error("a directory was read")
	}
}

func TestFile(t *testing.T) {
	t.Setenv("HOME", "/home/ada")
	for _, tt := range []struct{ env, xdg, want string }{
		{"", "", "/home/ada/.config/doppel/config.yaml"}, {"", "/xdg", "/xdg/doppel/config.yaml"}, {"/my.yaml", "/xdg", "/my.yaml"},
	} {
		t.Setenv(EnvFile, tt.env)
		t.Setenv("XDG_CONFIG_HOME", tt.xdg)
		if got, err := File(); err != nil || got != tt.want {
			t.Errorf("%s, %v, want %s", got, err, tt.want)
		}
	}
}

func TestKeys(t *testing.T) {
	keys := Keys()
	for _, k := range []string{"output", "connect.context", "intercept.timeout"} {
		if !slices.Contains(keys, k) {
			t.Errorf("no key %s in %v", k, keys)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("connect: {context: prod}\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = Parse(b) })
}
