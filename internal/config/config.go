// Package config owns the user's configuration file, over which flags win: its schema, where it lies, and reading and checking it.
package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// EnvFile names the environment variable that moves the file.
const EnvFile = "DOPPEL_CONFIG"

// Config is the file. Each field's key, meaning and default stand in docs/configuration.md; zero means the default.
type Config struct {
	// Output is the format of answers: text, json or yaml.
	Output string `json:"output,omitempty"`
	// LogLevel of the daemons from the next start on: error, warn, info or debug.
	LogLevel string `json:"logLevel,omitempty"`
	// Connect is for connect and whatever else chooses a cluster.
	Connect localapi.ConnectRequest `json:"connect,omitzero"`
	// Intercept is for intercept.
	Intercept Intercept `json:"intercept,omitzero"`
	// Relay is for login, previews and tokens.
	Relay Relay `json:"relay,omitzero"`
}

// Relay is the relay that is meant where none is named.
type Relay struct {
	// URL is where it is.
	URL string `json:"url,omitempty"`
	// CAFile is the certificate of its own authority, for the token in the environment.
	CAFile string `json:"caFile,omitempty"`
}

// Intercept are the defaults of doppel intercept.
type Intercept struct {
	// Address is where local processes listen.
	Address string `json:"address,omitempty"`
	// Timeout is how long an intercept may make no progress before it is active.
	Timeout Duration `json:"timeout,omitempty"`
}

// Duration is a time written as "90s" or "2m".
type Duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err == nil && v <= 0 {
		err = errors.New("want a time above zero")
	}
	*d = Duration(v)
	return err
}

// File is where the configuration is: $DOPPEL_CONFIG, or doppel/config.yaml in $XDG_CONFIG_HOME or ~/.config.
func File() (string, error) {
	if f := os.Getenv(EnvFile); f != "" {
		return f, nil
	}
	base := os.Getenv("XDG_CONFIG_HOME")
	if base == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		base = filepath.Join(home, ".config")
	}
	return filepath.Join(base, "doppel", "config.yaml"), nil
}

// maxFile bounds the file in bytes.
const maxFile = 1 << 20

// Load reads the file; one that is not there is empty.
func Load(file string) (Config, error) {
	st, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return Config{}, nil
	}
	if err == nil && st.Size() > maxFile {
		return Config{}, uerr.New(uerr.Usage, "see docs/configuration.md", "%s has %d bytes, more than %d", file, st.Size(), maxFile)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return Config{}, uerr.Wrap(err, uerr.Usage, "make it readable, or name another with $"+EnvFile, "read the configuration")
	}
	c, err := Parse(b)
	if err != nil {
		return Config{}, uerr.Wrap(err, uerr.Usage, "mend or remove the file; what it may have: doppel config view --keys", "%s", file)
	}
	return c, nil
}

// Parse reads and checks a configuration. Every error says its line.
func Parse(b []byte) (Config, error) {
	var c Config
	var doc yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(&doc); err != nil {
		if errors.Is(err, io.EOF) {
			return c, nil // nothing but comments
		}
		return c, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	var errs []error
	fill(doc.Content[0], reflect.ValueOf(&c).Elem(), "", &errs)
	return c, errors.Join(append(errs, c.check()...)...)
}

func (c Config) check() []error {
	var errs []error
	if c.Output != "" && !slices.Contains([]string{"text", "json", "yaml"}, c.Output) {
		errs = append(errs, fmt.Errorf("output %q: want text, json or yaml", c.Output))
	}
	if c.LogLevel != "" && !slices.Contains([]string{"error", "warn", "info", "debug"}, c.LogLevel) {
		errs = append(errs, fmt.Errorf("logLevel %q: want error, warn, info or debug", c.LogLevel))
	}
	return errs
}

// fill sets v from a YAML node and notes every key it does not know and every value that does not fit.
func fill(n *yaml.Node, v reflect.Value, path string, errs *[]error) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Tag == "!!null" {
		return
	}
	if !isSection(v.Type()) {
		if err := set(n, v); err != nil {
			*errs = append(*errs, fmt.Errorf("line %d: %s: %w", n.Line, path, err))
		}
		return
	}
	if n.Kind != yaml.MappingNode {
		*errs = append(*errs, fmt.Errorf("line %d: %s: want keys and values below it", n.Line, path))
		return
	}
	fields := sectionFields(v.Type())
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := key.Value
		if path != "" {
			at = path + "." + key.Value
		}
		index, ok := fields[key.Value]
		switch {
		case !ok:
			*errs = append(*errs, fmt.Errorf("line %d: unknown key %s%s", key.Line, at, nearMiss(key.Value, fields)))
		case seen[key.Value]:
			*errs = append(*errs, fmt.Errorf("line %d: %s is there twice", key.Line, at))
		default:
			fill(value, v.FieldByIndex(index), at, errs)
		}
		seen[key.Value] = true
	}
}

// set decodes one value by way of JSON, so that types with forms of their own (addresses, subnets, times) read them here as elsewhere.
func set(n *yaml.Node, v reflect.Value) error {
	var plain any
	if err := n.Decode(&plain); err != nil {
		return err
	}
	if v.Kind() == reflect.String && n.Kind == yaml.ScalarNode {
		plain = n.Value // "context: 1" is a name
	}
	b, err := json.Marshal(plain)
	if err != nil {
		return err
	}
	err = json.Unmarshal(b, v.Addr().Interface())
	var te *json.UnmarshalTypeError
	if errors.As(err, &te) {
		return fmt.Errorf("%s is not %s", te.Value, kindName(te.Type))
	}
	return err
}

func kindName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	case reflect.Map:
		return "keys and values"
	case reflect.String:
		return "a text"
	default:
		return "a number"
	}
}

// isSection says whether a type has keys of its own: a struct that does not read itself.
func isSection(t reflect.Type) bool {
	if t.Kind() != reflect.Struct {
		return false
	}
	p := reflect.PointerTo(t)
	return !p.Implements(reflect.TypeFor[json.Unmarshaler]()) && !p.Implements(reflect.TypeFor[interface{ UnmarshalText([]byte) error }]())
}

// sectionFields are a struct's keys; those of embedded structs are its own. A field with the tag config:"-" has none.
func sectionFields(t reflect.Type) map[string][]int {
	out := map[string][]int{}
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous || !f.IsExported() || name == "-" || name == "" || f.Tag.Get("config") == "-" {
			continue
		}
		out[name] = f.Index
	}
	return out
}

// Keys are all keys with dots between sections, sorted.
func Keys() []string {
	var out []string
	var walk func(t reflect.Type, path string)
	walk = func(t reflect.Type, path string) {
		for name, index := range sectionFields(t) {
			if ft := t.FieldByIndex(index).Type; isSection(ft) {
				walk(ft, path+name+".")
				continue
			}
			out = append(out, path+name)
		}
	}
	walk(reflect.TypeFor[Config](), "")
	slices.Sort(out)
	return out
}

// nearMiss suggests the known key that was probably meant.
func nearMiss(key string, fields map[string][]int) string {
	best, distance := "", 1+len(key)/3 // more is another word
	for name := range fields {
		if d := edits(strings.ToLower(key), strings.ToLower(name)); d < distance || d == distance && best != "" && name < best {
			best, distance = name, d
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean " + best + "?"
}

// edits is the Levenshtein distance.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
