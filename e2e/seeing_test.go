package e2e

import (
	"archive/zip"
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestSeeing is what a laptop is told of itself, the cluster and the connection.
func TestSeeing(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "seeing")
	c.sample(t, ns)
	l := newLaptop(t, "seer")
	l.withoutManager(t)

	t.Run("doctor before there is anything", func(t *testing.T) {
		r := l.try(t, "doppel", "doctor", "-n", ns)
		if r.code != 1 || !strings.Contains(r.stdout, "fail  traffic-manager") || !strings.Contains(r.stdout, "-> install it with: doppel helm install") {
			t.Errorf("%v", r)
		}
		want(t, r.stdout, "ok    subnets", "10.96.0.0/16")
		l.sh(t, "ip link add vpn0 type veth peer name vpn1 && ip addr add 10.96.7.1/24 dev vpn0 && ip link set vpn0 up && ip link set vpn1 up")
		want(t, l.try(t, "doppel", "doctor", "-n", ns).stdout, "warn  subnets", "10.96.0.0/16 overlaps 10.96.7.0/24 of vpn0", "--allow-conflicting-subnets 10.96.0.0/16")
		l.sh(t, "ip link del vpn0")
	})
	l.run(t, "doppel", "connect", "-n", ns)
	l.colors(t, "blue", "127.0.0.1:3000")
	l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")
	t.Run("doctor while connected", func(t *testing.T) {
		out := l.run(t, "doppel", "doctor", "-n", ns)
		for _, check := range []string{
			"configuration", "TUN device", "nftables", "resolvers", "user daemon", "root daemon", "kubeconfig", "API server", "clock", "right to connect",
			"right to intercept", "traffic-manager", "way in", "reach", "injection webhook", "tunnel", "routes", "subnets", "DNS", "lookup",
		} {
			if !strings.Contains(out, "\nok    "+check+" ") && !strings.HasPrefix(out, "ok    "+check+" ") {
				t.Errorf("%s is not ok:\n%s", check, out)
			}
		}
	})
	t.Run("doctor for programs", func(t *testing.T) {
		var list []struct{ Name, State string }
		if err := json.Unmarshal([]byte(l.run(t, "doppel", "doctor", "-n", ns, "-o", "json")), &list); err != nil || len(list) < 15 {
			t.Errorf("%v: %+v", err, list)
		}
	})
	t.Run("status", func(t *testing.T) {
		l.run(t, "curl", "-sf", "-m", "5", "-o", "/dev/null", "http://verylargejavaservice:8080/")
		want(t, l.run(t, "doppel", "status"), "Tunnel     : up (", "Reaches    : the whole cluster", "Flows      : ", "Interface  : doppel0")
		var st struct {
			Session struct {
				LatencyMS float64
				Flows     struct{ Total, DownBytes, DNSCluster uint64 }
			}
		}
		if err := json.Unmarshal([]byte(l.run(t, "doppel", "status", "-o", "json")), &st); err != nil {
			t.Fatal(err)
		}
		if s := st.Session; s.LatencyMS <= 0 || s.Flows.Total == 0 || s.Flows.DownBytes == 0 || s.Flows.DNSCluster == 0 {
			t.Errorf("%+v", s)
		}
	})
	t.Run("idle conversations end", func(t *testing.T) {
		udpOpen := func() (open int, total uint64) {
			var st struct {
				Session struct {
					Flows struct {
						UDPOpen int
						Total   uint64
					}
				}
			}
			if err := json.Unmarshal([]byte(l.run(t, "doppel", "status", "-o", "json")), &st); err != nil {
				t.Fatal(err)
			}
			return st.Session.Flows.UDPOpen, st.Session.Flows.Total
		}
		_, before := udpOpen()
		server := strings.Split(c.clusterIP(t, "kube-system", "kube-dns"), ":")[0]
		want(t, l.run(t, "dig", "+short", "@"+server, "dataprocessingservice."+ns+".svc.cluster.local"), "10.96.") // a conversation of port 53: 5 s
		if _, total := udpOpen(); total <= before {
			t.Errorf("%d flows, %d before", total, before)
		}
		eventually(t, 30*time.Second, func() error {
			if open, _ := udpOpen(); open > 0 {
				return fmt.Errorf("%d UDP conversations are open", open)
			}
			return nil
		})
	})
	t.Run("completion", func(t *testing.T) {
		want(t, l.run(t, "doppel", "__complete", "intercept", "very"), "verylargejavaservice")
		want(t, l.run(t, "doppel", "__complete", "leave", ""), "dataprocessingservice")
		want(t, l.run(t, "doppel", "__complete", "list", "-n", "see"), ns)
		for _, shell := range []string{"bash", "zsh", "fish"} { // each reads the script without complaint, where it is installed
			l.sh(t, fmt.Sprintf("command -v %s >/dev/null || exit 0; doppel completion %s > /run/c.%s && %s -n /run/c.%s", shell, shell, shell, shell, shell))
		}
	})
	t.Run("log levels", func(t *testing.T) {
		l.run(t, "doppel", "loglevel", "debug", "--for", "5m")
		l.try(t, "curl", "-s", "-m", "1", "http://verylargejavaservice:81/")
		want(t, l.tail("rootd.log"), "log level changed")
		eventually(t, 10*time.Second, func() error {
			if log := l.tail("daemon.log"); !strings.Contains(log, "level=DEBUG") {
				return fmt.Errorf("the user daemon: %s", log)
			}
			if log := managerLog(c); !strings.Contains(log, "loglevel=debug") {
				return fmt.Errorf("the manager: %s", log)
			}
			l.try(t, "curl", "-s", "-m", "1", c.clusterIP(t, ns, "dataprocessingservice"))
			return nil
		})
		l.run(t, "doppel", "loglevel", "reset")
		eventually(t, 10*time.Second, func() error {
			if log := managerLog(c); !strings.Contains(log, `loglevel=""`) {
				return fmt.Errorf("the manager: %s", log)
			}
			return nil
		})
	})
	t.Run("gather-logs", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "logs.zip")
		l.run(t, "doppel", "gather-logs", "-n", ns, "-f", file)
		z, err := zip.OpenReader(file)
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		names := ""
		for _, f := range z.File {
			names += f.Name + "\n"
			r, err := f.Open()
			if err != nil {
				t.Fatal(err)
			}
			if m := secretRE.FindString(drain(r)); m != "" {
				t.Errorf("%s holds a secret: %s", f.Name, m)
			}
		}
		want(t, names, "daemon.log", "rootd.log", "status.yaml", "doctor.txt", "manager/traffic-manager-", "agents/dataprocessingservice-", "intercepts.yaml", "sessions.yaml")
	})
}

// secretRE finds keys, tokens and credentials of a kubeconfig.
var secretRE = regexp.MustCompile(`PRIVATE KEY-----[^*]|\beyJ[A-Za-z0-9_-]{20}|client-key-data: [^*]`)
