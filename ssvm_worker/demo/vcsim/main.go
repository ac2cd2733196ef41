// Command vcsim is a simulated vCenter for tests and the demo: govmomi's simulator over TLS.
// It adds features for exports: CreateDescriptor, thumbprints and leases that expire.
// Clients can switch faults on and off at run time.
//
// The program prints one line of JSON with its URL and its certificate as PEM.
package main

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log"
	"net/url"
	"os"
	"strings"

	"github.com/vmware/govmomi/simulator"
)

// apiVersion is the newest API that pyVmomi 9.1 supports. With an older version, pyVmomi rejects the newer members.
const apiVersion = "8.0.3.0"

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	names := flag.String("names", "localhost,127.0.0.1", "names and addresses for a self-signed certificate")
	certificate := flag.String("cert", "", "PEM file of a certificate, instead of a self-signed one")
	key := flag.String("key", "", "PEM file of its private key")
	username := flag.String("username", "administrator@vsphere.local", "the only user; $VCSIM_PASSWORD is the password")
	esx := flag.Bool("esx", false, "simulate a standalone ESXi host")
	descriptor := flag.Bool("descriptor", true, "support OvfManager.CreateDescriptor")
	child := flag.Bool("child", false, "exit at the end of standard input, for example when the parent exits")
	verbose := flag.Bool("verbose", false, "write the simulator's log")
	flag.Parse()
	if !*verbose {
		log.SetOutput(io.Discard)
	}

	pair := identity(*certificate, *key, strings.Split(*names, ","))
	model, product := simulator.VPX(), "VMware vCenter Server"
	if *esx {
		model, product = simulator.ESX(), "VMware ESXi"
	}
	about := &model.ServiceContent.About
	about.ApiVersion, about.Version = apiVersion, apiVersion
	about.FullName = fmt.Sprintf("%s %s (simulated)", product, apiVersion)
	must(model.Create())
	model.Service.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	model.Service.Listen = &url.URL{Host: *listen, User: url.UserPassword(*username, os.Getenv("VCSIM_PASSWORD"))}
	world := newWorld(model.Service, thumbprint(pair.Certificate[0]))
	if !*esx {
		world.addStoragePod()
	}
	if *descriptor {
		world.addDescriptor()
	}
	server := model.Service.NewServer()
	world.address = server.URL.Host
	world.nameHosts(faults{})
	// No client knows the URL yet, so no request runs during this change.
	server.Config.Handler = world.handler(server.Config.Handler)
	must(json.NewEncoder(os.Stdout).Encode(map[string]string{
		"url":         "https://" + server.URL.Host,
		"certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})),
	}))
	if !*child {
		select {}
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	model.Remove()
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
