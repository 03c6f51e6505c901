package relayclient

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gofrs/flock"

	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Login is one login at a relay.
type Login struct {
	URL   string       `json:"url"` // https://DOMAIN, without a slash behind it
	Token string       `json:"token"`
	Who   relayapi.Who `json:"who"`
	CA    string       `json:"ca,omitempty"` // PEM of the relay's own authority
	// Permission is what the user has said of intercepts that are started on the relay's page.
	Permission relayapi.Permission `json:"permission,omitempty"`
	// FromEnv says that the token is of the environment, and is not to be kept.
	FromEnv bool `json:"-"`
	// Ingresses are where previews enter clusters, as was said last, by the cluster's ID.
	Ingresses map[string]Ingress `json:"ingresses,omitempty"`
}

// Ingress is where a preview's requests enter a cluster.
type Ingress struct {
	Host   string `json:"host"`
	Port   int32  `json:"port"`
	TLS    bool   `json:"tls,omitempty"`
	L5Host string `json:"l5Host,omitempty"`
}

// Logins are this user's logins; the newest comes first.
type Logins struct {
	Logins []Login `json:"logins"`
	file   string
	env    *Login // the one of the environment, before all others; nil: none
	relay  string // that is meant where none is named; "": none
}

// Environment variables with which a program acts at a relay without a login.
const (
	EnvToken = "DOPPEL_RELAY_TOKEN"
	EnvRelay = "DOPPEL_RELAY"
	EnvCA    = "DOPPEL_RELAY_CA_FILE"
)

// Load reads the logins: a file beside the configuration, for its user alone, and what the environment says, over the configured relay and the file
// with its authority. A token in the environment is for the relay that the user names there or in the configuration, and for no other: what a
// cluster says must not lead it elsewhere.
func Load(configFile, relay, caFile string) (*Logins, error) {
	l := &Logins{file: filepath.Join(filepath.Dir(configFile), "relays.json")}
	if err := l.read(); err != nil {
		return nil, err
	}
	var err error
	if relay = cmp.Or(os.Getenv(EnvRelay), relay); relay != "" {
		if l.relay, err = URL(relay); err != nil {
			return nil, err
		}
	}
	token := os.Getenv(EnvToken)
	switch {
	case token == "":
		return l, nil
	case l.relay == "":
		return nil, uerr.New(uerr.Usage, "set "+EnvRelay+", or relay.url in the configuration", "%s is set, but not for which relay", EnvToken)
	}
	known, _ := l.At(l.relay)
	l.env = &Login{URL: l.relay, Token: token, CA: known.CA, Ingresses: known.Ingresses, FromEnv: true}
	if caFile = cmp.Or(os.Getenv(EnvCA), caFile); caFile != "" {
		ca, err := os.ReadFile(caFile)
		if err != nil {
			return nil, uerr.Wrap(err, uerr.Usage, "", "read the relay's authority")
		}
		l.env.CA = string(ca)
	}
	return l, nil
}

// Relay is the relay that is meant where none is named; "": the user has not said.
func (l *Logins) Relay() string { return l.relay }

// All are all logins, that of the environment first.
func (l *Logins) All() []Login {
	if l.env == nil {
		return l.Logins
	}
	return append([]Login{*l.env}, l.Logins...)
}

// change makes one change to what the file says now: other commands may have changed it since it was read, while this one waited for a person.
func (l *Logins) change(fn func()) error {
	if err := os.MkdirAll(filepath.Dir(l.file), 0o700); err != nil {
		return err
	}
	lock := flock.New(l.file+".lock", flock.SetPermissions(0o600))
	if err := lock.Lock(); err != nil {
		return fmt.Errorf("lock the logins: %w", err)
	}
	defer lock.Unlock() //nolint:errcheck // it ends with the process, if not before
	if err := l.read(); err != nil {
		return err
	}
	fn()
	return l.save()
}

func (l *Logins) read() error {
	l.Logins = nil
	b, err := os.ReadFile(l.file)
	if err == nil {
		err = json.Unmarshal(b, l)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return uerr.Wrap(err, uerr.Usage, "remove it, and log in again", "logins at relays in %s", l.file)
	}
	return nil
}

// save writes the file as a whole or not at all.
func (l *Logins) save() error {
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(l.file), ".relays-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), l.file)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write logins: %w", err), os.Remove(f.Name()))
	}
	return nil
}

// At is the login at a relay; with an empty URL that of the environment, or the newest.
func (l *Logins) At(relay string) (Login, bool) {
	for _, login := range l.All() {
		if relay == "" || login.URL == relay {
			return login, true
		}
	}
	return Login{}, false
}

// Put keeps a login, as the newest, and returns the one in whose place it is, if there was one. What the account was allowed, and where its previews
// entered clusters, stays; it is not another account's.
func (l *Logins) Put(login Login) (was Login, err error) {
	err = l.change(func() {
		login.Permission = relayapi.NotAsked
		for _, o := range l.Logins {
			if o.URL != login.URL {
				continue
			}
			if was = o; o.Who.Email == login.Who.Email {
				login.Permission, login.Ingresses = o.Permission, o.Ingresses
			}
		}
		l.Logins = slices.Insert(slices.DeleteFunc(l.Logins, func(o Login) bool { return o.URL == login.URL }), 0, login)
	})
	return was, err
}

// Enter keeps where previews enter a cluster; that of the environment is not kept.
func (l *Logins) Enter(login Login, cluster string, in Ingress) error {
	if login.FromEnv {
		return nil
	}
	_, err := l.at(login.URL, func(o *Login) {
		if o.Ingresses == nil {
			o.Ingresses = map[string]Ingress{}
		}
		o.Ingresses[cluster] = in
	})
	return err
}

// Permit keeps what the user says of intercepts that are started on a relay's page; false: there is no login at that relay.
func (l *Logins) Permit(relay string, p relayapi.Permission) (bool, error) {
	return l.at(relay, func(o *Login) { o.Permission = p })
}

// at changes the login at a relay; false: there is none.
func (l *Logins) at(relay string, fn func(*Login)) (found bool, err error) {
	err = l.change(func() {
		for i := range l.Logins {
			if l.Logins[i].URL == relay {
				fn(&l.Logins[i])
				found = true
			}
		}
	})
	return found, err
}

// Remove forgets a login.
func (l *Logins) Remove(relay string) error {
	return l.change(func() {
		l.Logins = slices.DeleteFunc(l.Logins, func(o Login) bool { return o.URL == relay })
	})
}

// URL is the address of a relay in its one form, from what a person typed: a domain will do.
func URL(s string) (string, error) {
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return "", uerr.New(uerr.Usage, "for example: doppel login https://preview.example.com", "%q is not the address of a relay", s)
	}
	return "https://" + strings.TrimSuffix(strings.ToLower(u.Host), ":443"), nil
}
